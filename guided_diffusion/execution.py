"""How a network is executed on the device at hand: the type that is fastest there, and compiled blocks.

Which of two ways is faster depends on the device: bfloat16 is several times as fast as float32 where there are units
for it, and many times slower where there are none. So both are timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from zlib import crc32

from . import checkpoint
from .build import ModelOptions, build_model
from .dtypes import DTYPES, with_dtype
from .errors import UserError
from .late import Tensor, nn, no_grad, torch

if TYPE_CHECKING:
    from .attention import AttentionBlock
    from .unet import ResBlock, UNetModel

SECONDS = 1.0               # for all rounds of a comparison together
SHORTEST = 0.1              # seconds of an evaluation that is long enough to be timed
MOST_ROUNDS = 15
HOPELESS = 4.0              # how many times slower the first call may be than the fastest way, to be timed further
GAIN = 1.1                  # how many times as fast a less exact type must be, to be taken
LEAST_GAIN = 1.02           # how many times as fast compiled blocks must be, to be called faster

_codes: dict[str, CodeType] = {}
_timed: set[tuple[str, int]] = set()        # networks and batches whose gain was said in this process


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ended, of a device or of the host, in the words of whichever library noticed."""
    signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


@contextmanager
def enough_memory(option: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Turns the end of memory in the block into a UserError: the option with its value, the device, and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{option}: {device} is out of memory; {remedy}") from None


def check_memory(option: str, needed: int, device: torch.device) -> None:
    """Raises UserError where so many bytes, of a first map of features of a batch, are more than a device has.

    option: that says how large the batch is, with its value.
    """
    there = _memory_of(device)
    if there and needed > there:
        raise UserError(f"{option}: a first map of features alone takes {needed:,} bytes, and {device} has {there:,}")


def _memory_of(device: torch.device) -> int:
    """The bytes of memory that a device has; 0 where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):          # no such system
        return 0


@dataclass(frozen=True)
class Choice:
    """The fastest type, and the seconds of an evaluation of `batch` images in each that was timed."""

    dtype: str
    seconds: Mapping[str, float]
    batch: int

    def line(self) -> str:
        """What was chosen, and why, in one line."""
        times = ", ".join(f"{1000 * seconds:.3g} ms in {dtype}" for dtype, seconds in self.seconds.items())
        images = "an image" if self.batch == 1 else f"{self.batch} images"
        return f"--dtype auto: {self.dtype}; an evaluation of {images} takes {times}"


def choose_dtype(options: ModelOptions, batch_size: int, device: torch.device) -> Choice:
    """The type in which a network like this one is fastest on the device, timed for about a second.

    Random weights are timed, on as many of the `batch_size` images as an evaluation of SHORTEST seconds takes. float16
    is tried on GPUs alone. A less exact type must be GAIN times as fast as a more exact one to be taken.
    """
    names = [name for name in DTYPES if name != "float16" or device.type == "cuda"]
    networks = {name: _random_network(with_dtype(options, name), device) for name in names}
    batch = _batch(networks["float32"], batch_size)
    seconds = time_calls({name: partial(evaluation, network, batch) for name, network in networks.items()})
    return Choice(fastest(seconds), seconds, batch)


def fastest(seconds: Mapping[str, float]) -> str:
    """The name to take, where each later one must be GAIN times as fast as the one that is taken so far."""
    taken, *others = seconds
    for name in others:
        if seconds[name] * GAIN < seconds[taken]:
            taken = name
    return taken


def _random_network(options: ModelOptions, device: torch.device) -> UNetModel:
    with torch.device("meta"):
        model = build_model(options)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return checkpoint.ready(model, device)


def _batch(network: UNetModel, largest: int) -> int:
    """The number of images whose evaluation takes SHORTEST seconds, at most `largest`."""
    batch, seconds = 1, timed(partial(evaluation, network, 1))
    while batch < largest and seconds < SHORTEST:
        try:
            tried = min(2 * batch, largest)
            seconds = timed(partial(evaluation, network, tried))
        except torch.OutOfMemoryError:
            break
        batch = tried
    return batch


@no_grad
def evaluation(network: UNetModel, batch: int) -> Tensor:
    """The prediction of a network for so many images of noise, at the size it is made for."""
    device, size = next(network.parameters()).device, network.image_size
    noise = torch.randn(batch, network.image_channels, size, size, device=device,
                        generator=torch.Generator(device).manual_seed(0))
    conditions = {} if network.num_classes is None else {"y": torch.zeros(batch, dtype=torch.int64, device=device)}
    if network.in_channels != network.image_channels:
        conditions["low_res"] = noise
    return network(noise, torch.full((batch,), 500, device=device), **conditions)


def time_calls(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each function, which are called in turn until SECONDS are over.

    A first call warms up, and counts where it takes so long that this does not matter. A function that then is
    HOPELESS times slower than the fastest one is not called again.
    """
    times = {name: [_warmed(function, SECONDS)] for name, function in functions.items()}
    best = min(first for first, in times.values())
    running = [name for name, (first,) in times.items() if first < HOPELESS * best]
    until = time.monotonic() + SECONDS
    for _ in range(MOST_ROUNDS if best < SECONDS / 2 else 0):
        for name in running:
            times[name].append(timed(functions[name]))
        if time.monotonic() > until:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def _warmed(function: Callable[[], object], enough: float) -> float:
    """The seconds of a second call, or of the first one where they are more than enough."""
    first = timed(function)
    return first if first > enough else timed(function)


def timed(function: Callable[[], object]) -> float:
    """The seconds that a call takes, with all that it leaves to a GPU."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Waits until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Compiled blocks


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compiles the residual and attention blocks of a network, each for the very shapes that it is called with.

    The blocks are compiled and not the whole, so that whatever reads or replaces what is between and inside them
    (`guided_diffusion.capture`) stays right: an attention block that is observed or overridden runs as it is.
    backend: of torch.compile. The compilation itself happens at the first evaluation.
    """
    for block in _blocks(network):
        function = _separate(type(block).plain, f"plain_{crc32(repr(block).encode())}")
        block.compiled = torch.compile(MethodType(function, block), dynamic=False, backend=backend)


def _blocks(network: nn.Module) -> list[ResBlock | AttentionBlock]:
    from .attention import AttentionBlock
    from .unet import ResBlock

    return [block for block in network.modules() if isinstance(block, ResBlock | AttentionBlock)]


def _separate(function: Any, name: str) -> FunctionType:
    """A function with code of its own: torch compiles one code for a few shapes, and leaves further ones as they are.

    Blocks of one kind share a name, and with it what was compiled.
    """
    if name not in _codes:
        _codes[name] = function.__code__.replace(co_name=name)
    return FunctionType(_codes[name], function.__globals__, name)


def compile_for(network: UNetModel, batch_size: int) -> str:
    """Compiles a network for evaluations of so many images, and says in one line what that gains.

    A network like one that this process compiled before, such as that of the next row of a table, takes over what was
    compiled, and is not timed again. Raises UserError where it cannot be compiled.
    """
    call = partial(evaluation, network, batch_size)
    compile_blocks(network)
    with explained_compilation():
        compilation = timed(call)
    if (kind := (repr(network), batch_size)) in _timed:
        return f"--compile True: compiled as before, in {compilation:.1f} s"
    _timed.add(kind)
    seconds = time_calls({"plain": partial(_uncompiled, network, call), "compiled": call})
    gain = seconds["plain"] / seconds["compiled"]
    told = f"{1000 * seconds['compiled']:.3g} ms instead of {1000 * seconds['plain']:.3g} ms"
    images = "an image" if batch_size == 1 else f"{batch_size} images"
    verdict = f"{gain:.2f} times as fast" if gain > LEAST_GAIN else "which gains nothing here: leave it off"
    return f"--compile True: compiled in {compilation:.0f} s; an evaluation of {images} takes {told}, {verdict}"


def _uncompiled(network: nn.Module, function: Callable[[], object]) -> None:
    """Calls a function while the blocks of the network run as they are."""
    blocks = _blocks(network)
    compiled = [block.compiled for block in blocks]
    try:
        for block in blocks:
            block.compiled = None
        function()
    finally:
        for block, value in zip(blocks, compiled, strict=True):
            block.compiled = value


@contextmanager
def explained_compilation(active: bool = True) -> Iterator[None]:
    """Raises UserError where the first evaluation of a compiled network fails; not `active`: does nothing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not active:
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--compile True: the network can't be compiled here, leave it off ({first_line})") from error
