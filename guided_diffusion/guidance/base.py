"""What a guidance method is to the rest of the project: its options, and what they say of it.

A method is one file here: a term (`guided_diffusion.terms`), a class of options that extends `GuidanceOptions`, and a
line in GUIDANCE (`guided_diffusion.guidance`). Sampling runs, records, tables, plans, benchmarks and pictures loop over
that list and know no method by name. For example:

    @dataclass(frozen=True)
    class GreyOptions(GuidanceOptions):
        '''Guidance towards grey.'''

        short = "grey"
        kind = GradientGuidance
        switched_on: ClassVar = {"grey_scale": 0.1}

        grey_scale: float = option(0.0, "scale of guidance towards grey; 0: off")

        @property
        def active(self) -> bool:
            return self.grey_scale != 0

        def headline(self) -> str:
            return f"grey {self.grey_scale:g}"

        def build(self, nets: Networks) -> list[Guidance]:
            return [TowardsGrey(self.grey_scale)]

        def schedule(self) -> list[tuple[Guidance, Passes]]:
            return [(Guidance(self.grey_scale), TowardsGrey.passes)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

from .. import checkpoint
from ..errors import UserError
from ..late import Tensor, nn, torch
from ..options import Options, check_stated, comma_separated, nearest, option, option_fields
from ..presets import Preset
from ..terms import ContrastGuidance, Guidance, Passes, SigmaRange, WindowArguments

if TYPE_CHECKING:
    from ..unet import Encoder, UNetModel

BOUNDS = ("_start", "_stop", "_sigma_min", "_sigma_max")       # how the flags of windows end

AnyNetwork = TypeVar("AnyNetwork", bound="nn.Module")


class Reader(Protocol):
    """A network that reads feature maps of an evaluation, (N, C, H, W) each by the name of its block, at steps t (N,).

    blocks: names of those that it reads.
    """

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the blocks that it reads."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`."""

    def __call__(self, maps: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """What it reads, (N, ...)."""


def start_option(doing: str = "guided", later: bool = False) -> Any:
    """A field like `pag_start`: the step from which on a method acts. doing: what it does, in a word.

    later: see `option`.
    """
    return option(None, f"{doing} only at respaced steps below this one; unset: at all", minimum=0, later=later)


def sigma_min_option() -> Any:
    """A field like `sag_sigma_min`: the noise level above which a method guides."""
    return option(None, "guided only at noise levels sigma = sqrt((1 - abar) / abar) above this one; unset: at all",
                  minimum=0, later=True)


def sigma_max_option() -> Any:
    """A field like `sag_sigma_max`: the noise level up to which a method guides."""
    return option(None, "guided only at noise levels sigma up to this one; unset: at all", above=0, later=True)


@contextmanager
def naming(flag: str, value: str) -> Iterator[None]:
    """Begins a UserError that is raised in the block with the option that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{flag} {value or repr(value)}: {error}") from None


def block_names(value: str) -> list[str]:
    """The blocks that an option names, comma-separated. Raises UserError, for `naming`, where it names none."""
    names = comma_separated(value)
    if not names:
        raise UserError("must name blocks of the network, comma-separated, like middle")
    return names


def each(flag: str, *values: Any, **common: Any) -> tuple[Mapping[str, Any], ...]:
    """Settings for `GuidanceOptions.search`: one flag at each of these values, beside flags that all of them have."""
    return tuple({**common, flag: value} for value in values)


@dataclass(frozen=True)
class Networks:
    """What terms are built from.

    model: the network that is sampled. device: where further networks go. seed: of the run. random_weights: networks
    whose file is not given have random weights, for timing; else that is an error. model_path, entry: the file of the
    network that is sampled, where it has one, and the entry that is taken of it. num_classes: of the labels of images
    whose network has none, where that is known. flags: the options of the sampled network, where they are known.
    """

    model: UNetModel
    device: torch.device
    seed: int = 0
    random_weights: bool = False
    model_path: str = ""
    entry: str = ""
    num_classes: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)

    def check_classes(self, where: str, classes: int) -> None:
        """Raises UserError where a classifier, which `where` names, has other classes than the labels of the images."""
        own = self.model.num_classes
        if own is not None and own != classes:
            raise UserError(f"{where}: has {classes} classes, and the network that is sampled {own}")
        if own is None and self.num_classes not in (None, classes):
            raise UserError(f"{where}: has {classes} classes, and the images have those of --num_classes "
                            f"{self.num_classes}: pass --num_classes {classes}")

    def load(self, network: AnyNetwork, path: str, flags: Mapping[str, Any], entry: str | None = None,
             ) -> AnyNetwork:
        """A further network, ready for evaluation: the weights in `path` (see `checkpoint.load_into`), or random ones.

        flags: the options that an ADM network was built from; {} for any other module, whose file must hold its weights
        by the names and in the shapes of its `state_dict`. entry: of a file that holds several networks. Raises
        UserError for a file that cannot be read or does not fit.
        """
        if path or not self.random_weights:
            checkpoint.load_into(network, path, flags, entry)
        return checkpoint.ready(network, self.device)


@dataclass(frozen=True)
class GuidanceOptions(Options):
    """Base of the options of a guidance method.

    short: the method in a word, as in "SAG step". switched_on: flags that switch it on, with its paper's values.
    remedies: by flag of a file, where such a file comes from. needs_labels: the images need classes, also where the
    network has none. sigma_flags: the name of a method that has a window of noise levels, before `_sigma_min` and
    `_sigma_max` (fields by `sigma_min_option` and `sigma_max_option`). can_batch: its further evaluation differs from
    the step's own in its inputs alone (`ContrastGuidance.weaker`), so that `--batch_contrasts` acts on it.
    beside_the_step: it does not need the step's own evaluation for that (`ContrastGuidance.beforehand`). search: the
    settings among which a bench looks for the best one, from weak to strong, as flags by value (see `each`); none
    leaves the method out of benches. search_scale: the flag among them that a bench may also set beyond its first or
    last value, and its value that is off; None where there is none. for_pipelines: its terms also guide networks of
    diffusers, so that the command that samples pipelines has it. symbols: by flag, what titles and charts call an
    option, like s in "s = 0.1", and the value of the option at which that is 0. kind: which of the kinds in `terms` its
    terms are of, or at least one of them.
    """

    short: ClassVar[str]
    switched_on: ClassVar[Mapping[str, Any]]
    remedies: ClassVar[Mapping[str, str]] = {}
    needs_labels: ClassVar[bool] = False
    sigma_flags: ClassVar[str] = ""
    can_batch: ClassVar[bool] = False
    beside_the_step: ClassVar[bool] = False
    search: ClassVar[Sequence[Mapping[str, Any]]] = ()
    search_scale: ClassVar[tuple[str, float] | None] = None
    for_pipelines: ClassVar[bool] = False
    symbols: ClassVar[Mapping[str, tuple[str, float]]] = {}
    kind: ClassVar[type[Guidance]] = ContrastGuidance

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._sigma_levels
        if low is not None and high is not None and low >= high:
            flag = f"--{self.sigma_flags}_sigma"
            raise UserError(f"{flag}_min {low:g} {flag}_max {high:g}: the first must be smaller than the second")
        start, stop = (getattr(self, f"{self.sigma_flags}_{end}", None) for end in ("start", "stop"))
        if start is not None and stop is not None and start <= stop:
            flag = f"--{self.sigma_flags}"
            raise UserError(f"{flag}_start {start} {flag}_stop {stop}: the first must be greater than the second, as "
                            "steps count down")

    @classmethod
    def check_class(cls, beside: Sequence[type]) -> None:
        """See `Options.check_class`: also where what every method says is missing, names no option, or is another's."""
        super().check_class(beside)
        check_stated(cls, GuidanceOptions, "short", "switched_on", "active", "headline", "build", "schedule")
        names = [field.name for field in option_fields(cls)]
        for what, settings in (("switched_on", [cls.switched_on]), ("search", cls.search), ("symbols", [cls.symbols])):
            for flags in settings:
                if not isinstance(flags, Mapping):
                    raise UserError(f"{cls.__name__}.{what}: has {flags!r} where flags by value are expected")
                if unknown := [flag for flag in flags if flag not in names]:
                    raise UserError(f"{cls.__name__}.{what}: {unknown[0]} is none of its options"
                                    f"{nearest(unknown[0], names)}")
        namesakes = [other for other in beside
                     if issubclass(other, GuidanceOptions) and getattr(other, "short", None) == cls.short]
        if len(namesakes) > 1:
            shown = " and ".join(f"{other.__module__}.{other.__name__}" for other in namesakes)
            raise UserError(f'short "{cls.short}": is that of two methods, {shown}; rename or remove one')

    # What every method says

    @property
    def active(self) -> bool:
        """Whether the method is on: where it is not, it costs nothing and is named nowhere."""
        raise NotImplementedError

    def headline(self) -> str:
        """The method and its scale in words, like "SAG s = 0.1"."""
        raise NotImplementedError

    def build(self, nets: Networks) -> list[Guidance]:
        """The terms. Raises UserError for files that are missing or do not fit."""
        raise NotImplementedError

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """For each term its scale and window, as a plain `Guidance`, and what each step in that window costs."""
        raise NotImplementedError

    # What some methods say

    def details(self) -> dict[str, str]:
        """Further settings in words, by name: {"blur": "sigma = 3"}. Titles show those that are not the usual ones.

        "" is for one that changes no image beside the others as they are.
        """
        return {}

    def files(self) -> dict[str, str]:
        """The checkpoints that the terms need, by flag; they enter the run's fingerprint. None where it is off."""
        return {}

    def beside(self) -> dict[str, str]:
        """Files that lie beside those and are read as well, by the name that run.json has for them.

        They enter the run's fingerprint, too. Whether they are there is not looked at.
        """
        return {}

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """Other networks of `Passes.others` by name, as functions that build them; each takes x_t (N, C, H, W) and t.

        Plans count their operations. Networks that only a file describes are left out: they count as the one that is
        sampled.
        """
        return {}

    def readers(self) -> dict[str, Callable[[], Reader]]:
        """Networks of `Passes.readers` by name, as functions that build them, on any device and without weights.

        Plans count their operations; without one of them, as its file is missing, a whole gradient is counted.
        """
        return {}

    def useless(self) -> dict[str, str]:
        """Flags that change no image beside the others as they are, and why: {"threshold": "nothing is masked"}."""
        return {}

    def all_useless(self, why: str) -> dict[str, str]:
        """All flags of the method, for `useless`, with one reason."""
        return dict.fromkeys((field.name for field in option_fields(type(self))), why)

    def check(self, sha256: Mapping[str, str], entry: str = "") -> None:
        """Raises UserError where files do not belong together.

        sha256: of the run's checkpoints, by flag. entry: that is taken of the file of the network that is sampled.
        """

    @property
    def attention_block(self) -> str | None:
        """The attention block whose map the method reads, like "output.8"; None where it reads none."""
        return None

    @property
    def heads(self) -> str | None:
        """How that map is split into heads: "exact", or "official" as in the official code."""
        return None

    @property
    def attention_threshold(self) -> float:
        """From which attention on, where 1 is average, a token of that map is masked."""
        return 1.0

    def with_heads(self, heads: str) -> Self:
        """With the map split so; the same where the method reads none."""
        return self

    def at_blocks(self, model: Encoder) -> dict[str, Self]:
        """The method at each block of a network that it could act at, by the block's name; "" where it knows none."""
        return {"": self}

    def variants(self) -> dict[str, Self]:
        """Settings that are timed apart, by name: the method as it is, or switched on where it is off."""
        return {self.short: self if self.active else replace(self, **self.switched_on)}

    @classmethod
    def preset_values(cls, preset: Preset) -> dict[str, Any]:
        """Flags that suit a model known by name; without a scale, so that the method stays off."""
        names = {field.name for field in option_fields(cls)}
        return {name: value for name, value in preset.guidance.items() if name in names}

    @classmethod
    def stated_values(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Flags that the method's files state of themselves; `values`: all that are known, `given`: by the user.

        Raises UserError where those that were given contradict it.
        """
        return {}

    @classmethod
    def assumed(cls, values: Mapping[str, Any]) -> str:
        """A line on defaults that do not suit every network, where the method is on and they are taken; "" else.

        values: all flags that are known, so that those which are not among them have their defaults.
        """
        return ""

    # What follows from it

    @classmethod
    def bounds(cls) -> list[str]:
        """The flags of its window, by their usual endings; each may be unset."""
        return [field.name for field in option_fields(cls) if field.optional and field.name.endswith(BOUNDS)]

    @property
    def window(self) -> WindowArguments:
        """The window of steps and noise levels, as terms take it, of a method whose flags have the usual names.

        It has a `stop` where there is a flag for it: not every term takes one.
        """
        window: WindowArguments = {"start": getattr(self, f"{self.sigma_flags}_start", None), **self.sigma_range}
        if hasattr(self, f"{self.sigma_flags}_stop"):
            window["stop"] = getattr(self, f"{self.sigma_flags}_stop")
        return window

    @property
    def sigma_range(self) -> SigmaRange:
        """The window of noise levels, as terms take it."""
        low, high = self._sigma_levels
        return {"sigma_min": low, "sigma_max": high}

    @property
    def _sigma_levels(self) -> tuple[float | None, float | None]:
        if not self.sigma_flags:
            return None, None
        low, high = (getattr(self, f"{self.sigma_flags}_sigma_{end}", None) for end in ("min", "max"))
        return low, high

    def title(self, usual: Mapping[str, str] | None = None) -> str:
        """The method in words, like "SAG s = 0.1, sigma = 9": with those details that differ from `usual`.

        usual: from `details`; None: those of the default options. A window is always said.
        """
        usual = type(self)().details() if usual is None else usual
        differing = [words for name, words in self.details().items() if words and usual.get(name) != words]
        return ", ".join([self.headline(), *differing, *self._window_words()])

    def _window_words(self) -> list[str]:
        """The window in words, like "steps below 20" and "noise levels 0.3 to 5"; none where it is open.

        A bound that is one of the `details` is left to them.
        """
        words, details = [], self.details()
        start, stop = (next((getattr(self, flag) for flag in self.bounds()
                             if flag.endswith(f"_{end}") and end not in details), None) for end in ("start", "stop"))
        if start is not None:
            words.append(f"steps below {start}" if stop is None else f"steps {stop} to {start - 1}")
        elif stop is not None:
            words.append(f"steps from {stop} up")
        low, high = self._sigma_levels
        if high is not None:
            words.append(f"noise levels up to {high:g}" if low is None else f"noise levels {low:g} to {high:g}")
        elif low is not None:
            words.append(f"noise levels above {low:g}")
        return words

    def check_files(self) -> None:
        """Raises UserError where a file that the terms need is not named."""
        for flag, path in self.files().items():
            if not path:
                raise UserError(f"--{flag} is not given: {self.need(flag)}")

    def need(self, flag: str) -> str:
        """Why a file is needed, as the end of a sentence."""
        return f"{self.short} needs it" + (f", {self.remedies[flag]}" if flag in self.remedies else "")


@dataclass(frozen=True)
class ScaledOptions(GuidanceOptions):
    """Base of the options of a method that is one term with one scale, the flag `NAME_scale` (NAME: `sigma_flags`).

    It may have a window, by the flags `NAME_start`, `NAME_stop`, `NAME_sigma_min` and `NAME_sigma_max`. term: the class
    of the term, whose cost is the method's.
    """

    term: ClassVar[type[Guidance]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = getattr(cls, "term", cls.kind)
        scale = f"{cls.sigma_flags}_scale"
        if "search_scale" not in vars(cls):
            cls.search_scale = (scale, 0.0)
        if hasattr(cls, scale) and cls.headline is ScaledOptions.headline:
            cls.symbols = {scale: ("s", 0.0), **cls.symbols}

    @classmethod
    def check_class(cls, beside: Sequence[type]) -> None:
        """See `GuidanceOptions.check_class`: also where term, sigma_flags or the scale are missing."""
        check_stated(cls, ScaledOptions, "term", "sigma_flags")
        super().check_class(beside)
        if not isinstance(cls.term, type) or not issubclass(cls.term, Guidance):
            raise UserError(f"{cls.__name__}.term: is {cls.term!r}, must be the class of the term")
        if cls.scale is ScaledOptions.scale and not hasattr(cls, f"{cls.sigma_flags}_scale"):
            raise UserError(f'{cls.__name__}: has no option {cls.sigma_flags}_scale, as sigma_flags = '
                            f'"{cls.sigma_flags}" says')

    @property
    def scale(self) -> float:
        """The scale; 0 is off."""
        value: float = getattr(self, f"{self.sigma_flags}_scale")
        return value

    @property
    def active(self) -> bool:
        """Whether the scale is not 0."""
        return self.scale != 0

    @property
    def passes(self) -> Passes:
        """What each step in the window costs."""
        return self.term.passes

    def headline(self) -> str:
        """Like "PAG s = 1"."""
        return f"{self.short} s = {self.scale:g}"

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """The one scale and window."""
        return [(Guidance(self.scale, **self.window), self.passes)]


def without_labels(model: nn.Module) -> Callable[..., Tensor]:
    """An unconditional network among terms that have labels."""
    return lambda x, t, y=None, **conditions: model(x, t, **conditions)
