"""Multistep solvers of few steps: DPM-Solver++ (Lu et al., 2211.01095) and UniPC (Zhao et al., 2302.04867).

With lambda = log(alpha / sigma), h its change over a step from s to t, and D the guided x0 at s and at nodes before:

    x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) D_s + terms of the differences of the D before

Each step is linear in x, in the last D and in the noise. Its factors are numbers of the grid alone, and computed in
float64 (`Update`). UniPC also corrects x_t, once the network was evaluated there: this costs no evaluation more.

What guidance does here: contrasts change eps; gradients change it by -sqrt(1 - abar) grad; D is the x0 of that eps,
clipped or thresholded. The gradient of losses is taken from x_t, by the sampler, after this step. UniPC's corrector
adds the difference between the corrected and the predicted x_t to the x_t that the network saw, so that what was taken
from the predicted state is missing in the corrected one too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError
from .grids import CHAIN, GRIDS, GridProcess, log_snr
from .late import Tensor, torch
from .options import option
from .process import DiffusionProcess, Prediction
from .steps import Noise, SamplerOptions, Step, ddim_step
from .terms import StepContext

ORDERS = (1, 2, 3)
VARIANTS = ("bh1", "bh2")
DEFAULT_STEPS, MOST_STEPS = 20, 10**5
# Below so many steps DPM-Solver++ lowers its order towards the end: in its own code, and in diffusers, on chains.
FEW_STEPS, FEW_STEPS_OF_A_CHAIN = 10, 15


@dataclass(frozen=True)
class Update:
    """A step as factors: of x_t, of the last x0-predictions (newest first) and of the noise.

    correction: factors of the x0-predictions at the next node and before, whose sum UniPC adds to the next state once
    it is evaluated there.
    """

    state: float
    data: np.ndarray
    noise: float = 0.0
    correction: np.ndarray | None = None


@dataclass(frozen=True)
class Interval:
    """One step: alpha and sigma at its end, sigma at its start, and lambda at nodes, the end's first, then backwards.

    lambdas: as many as the order of the step, and one more.
    """

    alpha: float
    sigma: float
    sigma_start: float
    lambdas: Sequence[float]

    @property
    def h(self) -> float:
        """The change of lambda; infinite where the step ends without noise."""
        return self.lambdas[0] - self.lambdas[1]

    @property
    def order(self) -> int:
        """The order: one for each x0-prediction."""
        return len(self.lambdas) - 1


def dpm_solver_update(step: Interval, eta: float) -> Update:
    """A step of DPM-Solver++, multistep (2211.01095, algorithm 2, and its forms of third order and with noise).

    eta: 0, or 1 for SDE-DPM-Solver++, which has the orders 1 and 2.
    """
    h, d = step.h, np.eye(step.order)
    decay = math.expm1(-(1 + eta) * h)                      # e^-h - 1, with noise e^-2h - 1
    data = -step.alpha * decay * d[0]
    if step.order > 1:
        r0 = (step.lambdas[1] - step.lambdas[2]) / h
        slope = (d[0] - d[1]) / r0
    if step.order == 2:
        data = data - step.alpha * decay * slope / 2
    if step.order == 3:
        r1 = (step.lambdas[2] - step.lambdas[3]) / h
        change = slope - (d[1] - d[2]) / r1
        phi_2 = decay / h + 1
        data = data + step.alpha * phi_2 * (slope + r0 / (r0 + r1) * change)
        data = data - step.alpha * (phi_2 / h - 0.5) * change / (r0 + r1)
    kept = math.exp(-h) if eta else 1.0
    return Update(step.sigma / step.sigma_start * kept, data,
                  noise=step.sigma * math.sqrt(-decay) if eta else 0.0)


def unipc_update(step: Interval, variant: str) -> Update:
    """A step of UniPC (2302.04867, algorithms 7 and 8, data prediction), and the correction of its end.

    variant: "bh1" or "bh2", which is B(h) = h or e^h - 1. A predictor of second order takes 1/2 as its only factor, as
    the official code does.
    """
    h, order = step.h, step.order
    decay = math.expm1(-h)
    d = np.eye(order + 1)                                   # of x0 at the end, at the start, and before
    if math.isinf(h):                                       # only the first order, which ends in x0
        return Update(0.0, -step.alpha * decay * d[1, 1:])
    scale = -h if variant == "bh1" else decay
    ratios = np.array([(step.lambdas[i + 1] - step.lambdas[1]) / h for i in range(1, order)])
    slopes = [(d[i + 1] - d[1]) / ratio for i, ratio in enumerate(ratios, start=1)]
    predictor, corrector = _unipc_factors(np.append(ratios, 1.0), h, scale)
    predicted = _combined(predictor, slopes, d)
    corrected = _combined(corrector, [*slopes, d[0] - d[1]], d)
    return Update(step.sigma / step.sigma_start, (-step.alpha * (decay * d[1] + scale * predicted))[1:],
                  correction=-step.alpha * scale * (corrected - predicted))


def _combined(factors: np.ndarray, slopes: Sequence[np.ndarray], d: np.ndarray) -> np.ndarray:
    return sum((factor * slope for factor, slope in zip(factors, slopes, strict=True)), np.zeros(len(d)))


def _unipc_factors(ratios: np.ndarray, h: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The factors rho of predictor (order - 1,) and corrector (order,) (2302.04867, eq. 8 to 10, data prediction)."""
    order = len(ratios)
    phi = math.expm1(-h) / -h - 1
    right, factorial = [], 1
    for k in range(1, order + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    left = np.vander(ratios, order, increasing=True).T
    corrector = np.linalg.solve(left, right) if order > 1 else np.array([0.5])
    predictor = np.linalg.solve(left[:-1, :-1], right[:-1]) if order > 2 else np.full(order - 1, 0.5)
    return predictor, corrector


@dataclass(frozen=True)
class SolverOptions(SamplerOptions):
    """What both solvers share.

    sampling_steps: None is 20, and on "chain" all steps of the respaced chain.
    """

    refused_elsewhere = True

    solver_order: int = option(2, "order of the solver: 1, 2 or 3; 1 of dpm-solver++ is DDIM", choices=ORDERS)
    solver_grid: str = option("time-uniform", f"where the network is evaluated: {', '.join(GRIDS)}", choices=GRIDS)
    sampling_steps: int | None = option(None, f"evaluations; unset: {DEFAULT_STEPS}, and on the grid {CHAIN} those of "
                                        "--timestep_respacing, which this otherwise stands for", minimum=1,
                                        maximum=MOST_STEPS)
    dynamic_threshold: float | None = option(None, "dynamic thresholding of the predicted image by this quantile, such "
                                             "as 0.995, in place of clipping; unset: none", above=0, maximum=1)

    def update(self, step: Interval) -> Update:
        """The factors of a step."""
        raise NotImplementedError

    def lowers(self, steps: int) -> bool:
        """Whether the order falls to 1 towards the end, in a chain of so many steps."""
        raise NotImplementedError

    def name(self) -> str:
        """The solver and its order in words."""
        raise NotImplementedError

    def step(self) -> Step:
        """See `MultistepStep`."""
        return MultistepStep(self)

    def headline(self, steps: int) -> str:
        """Like "DPM-Solver++(2M), 20 steps, time-uniform"."""
        threshold = "" if self.dynamic_threshold is None else f", dynamic threshold {self.dynamic_threshold:g}"
        return f"{self.name()}, {steps} steps, {self.solver_grid}{threshold}"

    def respacing(self, timestep_respacing: str) -> str:
        """On "chain" --sampling_steps stands for it where it is not given; elsewhere it must not be given."""
        if self.solver_grid == CHAIN:
            return timestep_respacing or str(self.sampling_steps or "")
        if timestep_respacing:
            raise UserError(f"--timestep_respacing {timestep_respacing}: must be unset with --solver_grid "
                            f"{self.solver_grid}, which has --sampling_steps; only {CHAIN} is respaced")
        return timestep_respacing

    @property
    def fewest_steps(self) -> int:
        """The order, as so many evaluations are taken together."""
        return self.solver_order

    def num_steps(self, chain: int) -> int:
        """The steps of the grid. Raises UserError where there are fewer than the order, or it says otherwise."""
        steps = chain if self.solver_grid == CHAIN else self.sampling_steps or DEFAULT_STEPS
        if self.sampling_steps not in (None, steps):
            raise UserError(f"--sampling_steps {self.sampling_steps}: with --solver_grid {CHAIN} it must be the number "
                            f"of steps that --timestep_respacing gives, {steps}, or be left out")
        if steps < self.fewest_steps:
            raise UserError(f"--sampling_steps {steps}: must be at least {self.solver_order}, the --solver_order"
                            if self.sampling_steps else
                            f"--solver_order {self.solver_order}: must be at most the number of steps, {steps}")
        return steps

    def in_steps(self, steps: int) -> dict[str, Any]:
        """So many on the grid; on the chain that is its respacing."""
        return {"sampling_steps": steps, "timestep_respacing": ""}

    def process(self, diffusion: DiffusionProcess) -> DiffusionProcess:
        """The respaced chain, or a `GridProcess`."""
        steps = self.num_steps(diffusion.num_timesteps)
        return diffusion if self.solver_grid == CHAIN else GridProcess(diffusion, self.solver_grid, steps)

    def settled(self, timestep_respacing: str) -> dict[str, Any]:
        """Steps on the grid, and respacing on the chain."""
        return {"timestep_respacing": self.respacing(timestep_respacing),
                "sampling_steps": None if self.solver_grid == CHAIN else self.sampling_steps or DEFAULT_STEPS}

    @property
    def threshold_quantile(self) -> float | None:
        """That of --dynamic_threshold."""
        return self.dynamic_threshold


@dataclass(frozen=True)
class DpmSolverOptions(SolverOptions):
    """DPM-Solver++ (multistep), and what it shares with UniPC."""

    title = "DPM-Solver++"

    solver_eta: float = option(0.0, "fresh noise in DPM-Solver++: 0 none, 1 its stochastic form (orders 1 and 2)",
                               choices=(0.0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_eta and self.solver_order > 2:
            raise UserError(f"--solver_eta {self.solver_eta:g} --solver_order {self.solver_order}: the stochastic form "
                            "of DPM-Solver++ has the orders 1 and 2")

    def step(self) -> Step:
        """See `MultistepStep`; the first order is DDIM (`first_order_step`)."""
        return super().step() if self.solver_order > 1 else functools.partial(first_order_step, eta=self.solver_eta)

    def update(self, step: Interval) -> Update:
        """See `dpm_solver_update`."""
        return dpm_solver_update(step, self.solver_eta)

    def lowers(self, steps: int) -> bool:
        """Where there are few, as in the official code, and on chains as in diffusers."""
        return steps < (FEW_STEPS_OF_A_CHAIN if self.solver_grid == CHAIN else FEW_STEPS)

    def name(self) -> str:
        """Like "DPM-Solver++(2M)"; "SDE-" stands before the stochastic form."""
        return f"{'SDE-' if self.solver_eta else ''}{self.title}({self.solver_order}M)"


@dataclass(frozen=True)
class UnipcOptions(SolverOptions):
    """UniPC."""

    title = "UniPC"

    solver_variant: str = option("bh2", "form of UniPC's B(h): bh1 is h, bh2 is e^h - 1", choices=VARIANTS)

    def update(self, step: Interval) -> Update:
        """See `unipc_update`."""
        return unipc_update(step, self.solver_variant)

    def lowers(self, steps: int) -> bool:
        """Always, as in the official code."""
        return True

    def name(self) -> str:
        """Like "UniPC-2 (bh2)"."""
        return f"{self.title}-{self.solver_order} ({self.solver_variant})"


SOLVERS: dict[str, type[SolverOptions]] = {"dpm-solver++": DpmSolverOptions, "unipc": UnipcOptions}


def solver_options(solver: str, order: int, variant: str, steps: int, grid: str, eta: float,
                   dynamic_threshold: float | None) -> SolverOptions:
    """The options of a solver of SOLVERS; on the grid "chain", DEFAULT_STEPS is taken as no number of steps.

    Raises UserError for what is not allowed, or not together.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver {solver!r}: must be one of {', '.join(SOLVERS)}")
    common: dict[str, Any] = {
        "solver_order": order, "solver_grid": grid, "dynamic_threshold": dynamic_threshold,
        "sampling_steps": None if grid == CHAIN and steps == DEFAULT_STEPS else steps}
    own: dict[type[SolverOptions], dict[str, Any]] = {
        DpmSolverOptions: {"solver_eta": eta}, UnipcOptions: {"solver_variant": variant}}
    for kind, values in own.items():
        options = kind(**values)                # which checks them, whichever solver it is
        if kind is not SOLVERS[solver] and options != kind():
            shown = ", ".join(f"{name.removeprefix('solver_')} {value}" for name, value in values.items())
            raise UserError(f"{shown}: is an option of {kind.title}, and the solver is {solver}")
    return SOLVERS[solver](**common, **own[SOLVERS[solver]])


class MultistepStep:
    """The step of a solver (`steps.Step`), which remembers the last x0-predictions of its chain.

    It is made anew for each chain, and forgets at a chain's first step. All images of a batch are at one step.
    """

    def __init__(self, solver: SolverOptions) -> None:
        self.solver = solver
        self.data: list[Tensor] = []                    # x0-predictions, newest first
        self.correction: np.ndarray | None = None       # of the state that is coming

    def __call__(self, ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
        """x_{t-1} and the guided x0, (N, C, H, W) each; raises UserError where images are at different steps."""
        diffusion, t, index = ctx.denoise.diffusion, ctx.t, int(ctx.t[0])
        if (t != index).any():
            raise UserError(f"steps {sorted(set(t.tolist()))} in one batch: a multistep solver takes all images of a "
                            "batch through the same steps")
        if index == diffusion.num_timesteps - 1:
            self.data, self.correction = [], None
        pred = _with_gradient(ctx, pred, grad)
        self.data = [pred.pred_xstart, *self.data][:self.solver.solver_order + 1]
        x = ctx.x_t
        if self.correction is not None:
            x = _plus(x, self.correction, self.data)
        update = self.solver.update(self._interval(diffusion, index))
        self.correction = update.correction
        x = _plus(update.state * x, update.data, self.data)
        if update.noise and index:
            x = x + update.noise * noise()
        return x, pred.pred_xstart

    def _interval(self, diffusion: DiffusionProcess, index: int) -> Interval:
        """The step from a node to the next, of as high an order as there is history, and as the solver wants there."""
        abar, end = diffusion.alphas_cumprod, float(diffusion.alphas_cumprod_prev[index])
        order = min(self.solver.solver_order, len(self.data))
        if self.solver.lowers(diffusion.num_timesteps):
            order = min(order, index + 1)
        if end == 1:                                    # there lambda is infinite
            order = 1
        nodes = [end, *abar[index:index + order].tolist()]
        return Interval(alpha=math.sqrt(end), sigma=math.sqrt(1 - end), sigma_start=math.sqrt(1 - abar[index]),
                        lambdas=log_snr(np.array(nodes)).tolist())


def first_order_step(ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise, *, eta: float,
                     ) -> tuple[Tensor, Tensor]:
    """DDIM bit for bit, but that gradients enter before x0 is clipped, as in all steps of solvers."""
    return ddim_step(ctx, _with_gradient(ctx, pred, grad), None, noise, eta=eta)


def _with_gradient(ctx: StepContext, pred: Prediction, grad: Tensor | None) -> Prediction:
    """The prediction of eps - sqrt(1 - abar) grad."""
    if grad is None:
        return pred
    delta = ctx.denoise.diffusion.eps_with_gradient(torch.zeros_like(pred.eps), ctx.t, grad)
    return ctx.denoise.guided(pred, ctx.x_t, ctx.t, delta)


def _plus(x: Tensor, factors: np.ndarray, data: Sequence[Tensor]) -> Tensor:
    """The state x plus the first x0-predictions times their factors."""
    for factor, value in zip(factors.tolist(), data, strict=False):
        x = x + factor * value
    return x
