"""The folder of a training: its record in config.json, what may differ when it goes on, and its lock.

Whether a training may go on with another value of an option is decided here, option by option:
    counts no more      STARTS, --init_from and its like, once the folder has a state: they may be left out
    does not matter     HARMLESS; the training goes on, and a line says what is new
    moves the end       --lr_anneal_steps, --iterations: to a later step, or to or from no end at all; a line says so
    stays               FIXED, and all options of the network and the process: the state depends on them
    leaves images out   --skip_damaged True, as the error of a damaged image advises
    changes the result  everything else, like --lr, --seed or --batch_size: refused unless --change names it
--batch_size means the images of one step on all ranks together, and --data_dir means the images there, wherever they
lie now. With --dropout, --microbatch, --compile and the number of ranks change the result: its masks differ with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checkpoint, dist_util
from ..build import kind_of
from ..classes import KEY
from ..errors import UserError
from ..fetch import public_values, without_secrets
from ..files import check_folder, only_job, remove_leftovers, write_json
from ..foreign import reading
from ..functions import code_digest
from ..late import torch
from ..options import WATCHED
from ..version import __version__

SAME, ROUNDED = "the result is the same", "the result is the same up to rounding"
HARMLESS = {"out": "", "change": "", "log_interval": SAME, "save_interval": SAME, "eval_interval": SAME,
            "snapshot_images": SAME, "log": SAME, "log_online": SAME,
            "val_data_dir": SAME, "use_checkpoint": SAME, "microbatch": ROUNDED, "compile": ROUNDED}
FIXED = ("schedule_sampler", "ema_rate", "ema_power")
STARTS = ("resume_checkpoint", "init_from", "checkpoint_entry")
ENDS = ("lr_anneal_steps", "iterations")


@contextmanager
def locked_folder(out: str | Path) -> Iterator[None]:
    """Makes the folder `out` and holds it for this job, on rank 0; all ranks call this.

    Raises UserError where it cannot be written, or where another job trains or samples there.
    """
    path = Path(out)
    with ExitStack() as stack:
        with dist_util.together():
            checkpoint.check_name(path, "--out")
            check_folder("--out", path)
            if dist_util.is_main():
                stack.enter_context(only_job(path))
                remove_leftovers(path)
        yield


def shown(value: Any) -> Any:
    """A value of an option as records, logs and messages show it: without secrets of addresses, "" as ''."""
    return (without_secrets(value) or "''") if isinstance(value, str) else value


def code_of_this_library() -> dict[str, str]:
    """Its version, that of torch, and the SHA-256 of all its files of code."""
    root = Path(__file__).parents[1]
    return {"guided_diffusion": __version__, "torch": torch.__version__,
            "sha256": code_digest({str(file.relative_to(root)): file for file in root.rglob("*.py")})}


@dataclass(frozen=True)
class Record:
    """What config.json says of a training.

    model: the options of the network and the process by flag name. training: those of the training. ranks: processes.
    data: what `data_digest` says of --data_dir. classes: the names of the classes in the order of their numbers.
    watched: options of what looks at the training and does not change it, which may differ from start to start.
    code: versions of this library and torch, and the SHA-256 of this library's files.
    """

    model: Mapping[str, Any]
    training: Mapping[str, Any]
    ranks: int | None = None
    data: str | None = None
    classes: Sequence[str] | None = None
    watched: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Writes config.json, in which no address has a secret."""
        content: dict[str, Any] = {"model": dict(self.model), "training": public_values(self.training),
                                   "ranks": self.ranks}
        content |= {WATCHED: public_values(self.watched)} if self.watched else {}
        content |= {"data": self.data} if self.data else {}
        content |= {KEY: list(self.classes)} if self.classes else {}
        content |= {"code": dict(self.code)} if self.code else {}
        write_json(out / "config.json", content, sync=True)

    @classmethod
    def read(cls, out: Path) -> Record | None:
        """The record in a folder, None where there is none; raises UserError where config.json is something else."""
        path = out / "config.json"
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            ranks, names = saved.get("ranks"), saved.get(KEY)
            return cls(dict(saved["model"]), dict(saved["training"]), None if ranks is None else int(ranks),
                       saved.get("data"), None if names is None else [str(name) for name in names],
                       code=dict(saved.get("code", {})))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"--out {out}: its config.json is not one of a training, name another") from None

    @classmethod
    def stated_by(cls, state: Path) -> Record | None:
        """What the file of a state says of its training, where config.json is gone; None where there is no such file.

        Raises UserError where it is damaged or of something else.
        """
        if not state.exists():
            return None
        metadata = checkpoint.read_metadata(state)
        with reading(state, "is not the state of a training"):
            names = json.loads(metadata.get(KEY, "null"))
            return cls(dict(json.loads(metadata.get("config", "{}"))), {}, classes=names and [str(n) for n in names])

    @property
    def options(self) -> dict[str, Any]:
        """All options by flag name, as they are stored."""
        return public_values({**self.training, **self.model})

    def continues(self, before: Record, out: Path) -> list[str]:
        """What is new beside the record `before` of the same folder, a sentence each, where it does not matter.

        Raises UserError, naming the option, where the training cannot go on with it.
        """
        if (kind := kind_of(before.model)) != kind_of(self.model):
            raise UserError(f"--out {out}: holds the training of a network of another kind, {kind}; name another")
        allowed = {name for name in self.training.get("change", "").split(",") if name}
        self._check_classes(before, out)
        lines = []
        for name, now in self.options.items():
            then = before.options.get(name, now)
            if self._says_the_same(name, before):
                continue
            why = self._reason(name, before)
            if why is None and name in allowed:
                why = "as --change says"
            if why is None:
                raise UserError(self._refusal(name, before, out))
            if why:
                lines.append(f"--{name} {shown(now)}: was {shown(then)} so far; {why}")
        return lines + self._other_code(before)

    def _other_code(self, before: Record) -> list[str]:
        """What to say of code that is another than in `before`, or may be: older records say nothing of theirs."""
        if self.code and not before.code:
            return ["which code the training had so far is not recorded; from here on it may compute something else"]
        changed = [name for name, now in self.code.items() if before.code.get(name) != now]
        said = [f"{name} was {before.code.get(name)} so far and is {self.code[name]}" for name in changed
                if name != "sha256"]
        if "sha256" in changed and "guided_diffusion" not in changed:
            said += [f"guided_diffusion {self.code['guided_diffusion']} was changed"]
        return [f"the code is another: {', '.join(said)}; from here on it may compute something else"] if said else []

    def _check_classes(self, before: Record, out: Path) -> None:
        """Raises UserError where the numbers of the classes have other names than in `before`, or only one has names.

        Older records of the same images say nothing of their names.
        """
        now, then = list(self.classes or []), list(before.classes or [])
        if now == then or self.model.get("class_cond") != before.model.get("class_cond"):   # the latter is refused
            return
        data = f"--data_dir {shown(self.training.get('data_dir', ''))}"
        if now and then:
            raise UserError(f"{data}: has other classes than the run in {out}, or other numbers for them; put its "
                            "config.json back, or name another --out")
        if then or self.data is None or self.data != before.data:
            has, needed = ("names", "numbers only") if now else ("numbers only", "names")
            raise UserError(f"{data}: its classes have {has}, and those of the run in {out} have {needed}, so that "
                            f"it is not known which is which; give data whose classes have {needed}, or another --out")

    def repeats(self, before: Record) -> bool:
        """Whether a training by this record, begun anew, does what one by the record `before` did from its start."""
        same_classes = list(before.classes or []) == list(self.classes or [])
        return same_classes and all(self._repeats(name, before) for name in self.options)

    def _repeats(self, name: str, before: Record) -> bool:
        if self._says_the_same(name, before):
            return True
        return name in ("batch_size", "data_dir", *HARMLESS) and self._reason(name, before) is not None

    def _says_the_same(self, name: str, before: Record) -> bool:
        """Whether an option is as it was, and that is all there is to it: 0 became "0" in some, images may differ."""
        now, then = self.options[name], before.options.get(name, self.options[name])
        return name not in ("batch_size", "data_dir") and (now == then or str(now) == str(then))

    def _reason(self, name: str, before: Record) -> str | None:
        """Why the training may go on with a new value of an option; "": there is nothing new; None: it may not."""
        now, then = self.options[name], before.options.get(name, self.options[name])
        if name == "batch_size":
            return self._same_batch(before)
        if name == "data_dir":
            same = self.data == before.data if self.data and before.data else now == then
            return None if not same else "" if now == then else "the images are the same"
        if name == "skip_damaged" and now:
            return "damaged images are left out from here on"
        if name in STARTS:
            return "it counts at the start only" if not now else None
        if name in ENDS:
            later = not now or not then or (isinstance(then, int) and now > then)
            return "the end moves, and with it a learning rate that decays" if later else None
        why = HARMLESS.get(name)
        return None if why == ROUNDED and self._drops else why

    @property
    def _drops(self) -> bool:
        """Whether the network draws masks of dropout, which depend on how a batch is divided, and on compilation."""
        return bool(self.model.get("dropout"))

    def _same_batch(self, before: Record) -> str | None:
        now, then = self.training["batch_size"], before.training.get("batch_size")
        if then is None or self.ranks is None or before.ranks is None:          # an older record does not say
            return "" if then in (None, now) else None
        if (now, self.ranks) == (then, before.ranks):
            return ""
        same = now * self.ranks == then * before.ranks and not self._drops
        return f"with {self.ranks} rank(s) these are as many images a step as before" if same else None

    def _refusal(self, name: str, before: Record, out: Path) -> str:
        now, then = self.options[name], before.options[name]
        if name == "batch_size":
            ranks = "" if before.ranks is None else f" on {before.ranks}"
            what = "number of ranks or images a step, with dropout," if self._drops else "number of images a step"
            return (f"--batch_size {now} on {self.ranks} rank(s): the run in {out} has {then}{ranks}, and another "
                    f"{what} changes its result; give as many, another --out, or --change batch_size")
        if name == "data_dir" and now == then:
            return (f"--data_dir {shown(now)}: holds other images than when the run in {out} began; restore them, give "
                    "another --out, or --change data_dir")
        if name in STARTS:
            return (f"--{name} {shown(now)}: counts at the start only, and the run in {out} began with {shown(then)}; "
                    "leave it out, or give another --out")
        if name in ENDS:
            return (f"--{name} {shown(now)}: the run in {out} goes on to {shown(then)}, give that one, a later one or "
                    f"another --out, or --change {name} to end there, at once where it is past that step")
        fixed = name in FIXED or name in self.model
        return (f"--{name} {shown(now)}: the run in {out} has {shown(then)}, give that one or another --out"
                + ("" if fixed else f", or --change {name} to go on with the new one"))
