r"""Sample base images, upsample them and evaluate the result: one command, which goes on wherever it was stopped.

The words base, upsampler and evaluation begin the options of a part: those of image_sample.py, super_res_sample.py and
evaluate.py (cascade base --help shows them). Options before them are those of the cascade. There may be several
upsamplers, each of which goes on from the one before, and the evaluation may be left out.

Example:
    guided-pixels cascade --num_samples 1000 --out runs/cascade \
        base --model runs/icons32 --timestep_respacing 50 --guide_scale 1.2 --sel_attn_depth 2 \
        upsampler --model runs/icons64_upsampler --timestep_respacing 50 --batch_size 8 \
        evaluation references/icons64.npz --metrics fid,kid
"""

import sys
from collections.abc import Sequence
from itertools import pairwise

from evaluations.cascade import Cascade, CascadeOptions, EvaluationPart
from evaluations.evaluator import warn
from evaluations.evaluator_options import EvaluatorOptions
from evaluations.extractor_options import ExtractorOptions
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, cut, nearest, option_fields, options_parser
from guided_diffusion.runs.command import Run, read_run, say_note, say_without_effect
from guided_diffusion.runs.effects import in_words
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.upsample import UpsamplingRun

PARTS = ("base", "upsampler", "evaluation")
OTHERS = (CascadeOptions, ShowOptions, ExtractorOptions, EvaluatorOptions)
SHARED = ("num_samples", "seed", "out", "overwrite", "base_samples")


def divided(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The command line by parts, each with its name; the first, which has none, is that of the cascade itself.

    Raises UserError for a word that is neither the name of a part nor a value of an option.
    """
    parts: list[tuple[str, list[str]]] = [("", [])]
    kinds = {field.name: field.type for classes in (SamplingRun.classes(), UpsamplingRun.classes(), OTHERS)
             for kind in classes for field in option_fields(kind)}
    for before, word in pairwise(["", *argv]):
        option = before.removeprefix("--") if before.startswith("--") and "=" not in before else ""
        if word in PARTS and not (option and kinds.get(option, str) is str):
            parts.append((word, []))
            continue
        if not option and not word.startswith("-") and parts[-1][0] != "evaluation":
            raise UserError(f"{cut(word)}: is none of the words {', '.join(PARTS)}, which begin the options of a part"
                            f"{nearest(word, PARTS)}")
        parts[-1][1].append(word)
    return parts


def read(argv: Sequence[str]) -> tuple[Cascade, ShowOptions]:
    """The cascade that a command line describes, and what is shown. Raises UserError, which names the part."""
    (_, own), *parts = divided(argv)
    _, (options, show) = options_parser(own, CascadeOptions, ShowOptions, description=__doc__).read(own)
    named = [name for name, _ in parts]
    for name in ("base", "evaluation"):
        if named.count(name) > 1:
            raise UserError(f"{name}: stands {named.count(name)} times among the words of this command, must be once")
    base = [_run(name, words, SamplingRun) for name, words in parts if name == "base"]
    upsamplers = [_run(name, words, UpsamplingRun) for name, words in parts if name == "upsampler"]
    evaluation = _evaluation(dict(parts).get("evaluation"))
    if not base:
        raise UserError("a cascade needs base images: add the word base and its options, like base --model fmnist32")
    return Cascade(options, base[0], upsamplers, evaluation, warn), show


def _run(name: str, words: list[str], kind: type[Run]) -> Run:
    try:
        run, given = read_run(words, kind, f"The part {name} of a cascade.")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    taken = [f"--{flag}" for flag in SHARED if flag in given]
    if taken:
        raise UserError(f"{name} {', '.join(taken)}: is an option of the cascade, and stands before the word base"
                        if taken != ["--base_samples"] else
                        f"{name} --base_samples: cannot be given, the images of the part before are upsampled")
    say_without_effect(run, given)
    return run


def _evaluation(words: list[str] | None) -> EvaluationPart | None:
    if words is None:
        return None
    try:
        parser = options_parser(
            words, ExtractorOptions, EvaluatorOptions, description="The part evaluation of a cascade.",
            words=Words("REFERENCE", "the reference batch, a file or a bundled one by name", needed=True))
        references, (extractor, options) = parser.read(words)
        if len(references) > 1:
            raise UserError(f"{references[1]}: one reference is enough, the samples are those of the cascade")
        note = in_words(extractor.useless() | options.useless(), parser.given)
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    say_note(note)
    return EvaluationPart(references[0], extractor, options)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr(dist_util.is_main())
    cascade, show = read(sys.argv[1:] if argv is None else argv)
    found = cascade.run()
    dist_util.shutdown()
    tell(found, show)


if __name__ == "__main__":
    run_script(main)
