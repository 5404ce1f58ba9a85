"""Speed and memory of `softcheck model` beside one float64 forward and backward of the same model, in one process.

    python -m tests.benchmarks.model_speed [--models gpt2,bert,vit,resnet] [--large] [--repeat 3]
        [--threads 2] [--memory] [--profile 20]

The models are those of the transformers library with random numbers, stored in float32; GPT-2 has its 124M parameters
and 1×64 tokens with --large, and the others their base sizes. One unit is a float64 forward and backward with a
kernel of attention that has all derivatives (MATH), warm, the median of three and taken again around every check.
Measured are the group of the parameters (all of them verified in float64, with the making of the float64 twin) and
the whole command from survey to the last row, loading left out; then the steps of the whole command. Beside wall time
stands the processor time of all threads: with --threads 1 it is the steadier ratio on a machine with other work. Peak
memory (--memory) is the growth of the process's peak resident set over its size with the model, in a fresh process
each (Linux only), in units of the model's parameters in float64. Small models are all overhead: their ratios say little.
"""

import argparse
import cProfile
import multiprocessing
import pstats
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcheck_cli.checks.model.check import ModelCheck
from gradcheck_cli.checks.model.parameters import ParameterCheck
from gradcheck_cli.checks.model.plan import ModelPlan
from gradcheck_cli.checks.model.replica import Replica
from gradcheck_cli.models.case import ModelCase
from gradcheck_cli.results import CheckResult
from tests.benchmarks.speed import resident
from tests.model_zoo.checking import ACCUSING, make_model_case, told
from tests.model_zoo.library_models import seeded

GOALS = {"parameters": 8.0, "whole": 20.0}
"""Units that verifying every parameter in float64 and the whole command may take."""


def gpt2(*, large: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 1000, "n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}
    options: dict[str, Any] = {} if large else small
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **options))


def bert(*, large: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    options: dict[str, Any] = {} if large else {"vocab_size": 1000, "intermediate_size": 512, **_small()}
    return BertForMaskedLM(BertConfig(**options))


def vit(*, large: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"image_size": 64, "patch_size": 8, "intermediate_size": 512, "num_labels": 10, **_small()}
    options: dict[str, Any] = {"num_labels": 1000} if large else small
    return ViTForImageClassification(ViTConfig(**options))


def resnet(*, large: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "layer_type": "basic"}
    options: dict[str, Any] = {"num_labels": 1000} if large else {"num_labels": 10, **small}
    return ResNetForImageClassification(ResNetConfig(**options))


def _small() -> dict[str, Any]:
    return {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def _ids(length: int) -> Callable[[bool], Tensor]:
    return lambda large: torch.randint(2, 1000, (1, length), generator=torch.Generator().manual_seed(1))


def _images(large: bool) -> Tensor:
    size = 224 if large else 64
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


MODELS: Mapping[str, tuple[Callable[..., nn.Module], Callable[[bool], Tensor]]] = {
    "gpt2": (gpt2, _ids(64)),
    "bert": (bert, _ids(64)),
    "vit": (vit, _images),
    "resnet": (resnet, _images),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Seconds that passed, and seconds of all processors."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(wall=time.perf_counter(), processor=time.process_time())

    def since(self, start: "Clock") -> "Clock":
        return Clock(wall=self.wall - start.wall, processor=self.processor - start.processor)

    @classmethod
    def median(cls, found: Sequence["Clock"]) -> "Clock":
        return cls(
            wall=statistics.median(one.wall for one in found),
            processor=statistics.median(one.processor for one in found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The unit, each check, and the steps of the whole command (seconds) by what it said it was doing."""

    unit: Clock
    checks: Mapping[str, Clock]
    steps: Mapping[str, float]


def case_of(name: str, *, large: bool) -> ModelCase:
    make, inputs = MODELS[name]
    module = seeded(lambda: make(large=large))()
    return make_model_case(module, (inputs(large),), name=name)


def unit_of(case: ModelCase, repeat: int = 3) -> Clock:
    """Median of float64 forwards and backwards, warm."""
    module = case.module.double()
    args = [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in case.args]
    taken = []
    for _ in range(repeat + 1):
        started = Clock.now()
        with sdpa_kernel(SDPBackend.MATH):
            case.loss.call(module(*args, **case.kwargs)).backward()  # type: ignore[no-untyped-call]  # torch's own
        taken.append(Clock.now().since(started))
        module.zero_grad(set_to_none=True)
    module.float()
    return Clock.median(taken[1:])


class Steps:
    """The progress callback that adds up the time between one message and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now, self._since = "the checkpoint", time.perf_counter()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.stop()
        self._now = what

    def stop(self) -> None:
        now = time.perf_counter()
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._since = now


def check_parameters(case: ModelCase) -> list[CheckResult]:
    """Every parameter in float64, with the making of the twin."""
    replica = Replica(case)
    try:
        with replica.in_dtype(torch.float64):
            replica.widen()
            return list(ParameterCheck(replica, ModelPlan(), Steps(), float("inf")).results())
    finally:
        replica.close()


def check_whole(case: ModelCase, steps: Steps) -> list[CheckResult]:
    """All groups of the report."""
    rows = list(ModelCheck(case, ModelPlan(), steps).results())
    steps.stop()
    return rows


def measure(case: ModelCase) -> Measured:
    """Once, with a unit before and after every check."""
    units = [unit_of(case)]
    started = Clock.now()
    _tell(check_parameters(case))
    parameters = Clock.now().since(started)
    units.append(unit_of(case))
    started, steps = Clock.now(), Steps()
    _tell(check_whole(case, steps))
    whole = Clock.now().since(started)
    units.append(unit_of(case))
    return Measured(unit=Clock.median(units), checks={"parameters": parameters, "whole": whole}, steps=steps.seconds)


def _tell(rows: list[CheckResult]) -> None:
    """What is timed should be the check of a right model; a row that accuses one is told."""
    for row in rows:
        if row.verdict in ACCUSING:
            print(f"  {told(row)}"[:200], flush=True)


def _peak(pipe: Connection, what: str, name: str, large: bool) -> None:
    warnings.simplefilter("ignore")
    _quiet_transformers()
    check_whole(case_of(name, large=False), Steps())  # imports and thread pools are not counted
    case = case_of(name, large=large)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    if what == "parameters":
        check_parameters(case)
    else:
        check_whole(case, Steps())
    count = sum(one.numel() for one in case.module.parameters())
    pipe.send(1024 * (resident("VmHWM") - before) / (8 * count))


def peak(what: str, name: str, *, large: bool) -> float:
    """Peak memory beyond the module, in units of its parameters in float64, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(theirs, what, name, large))
    process.start()
    theirs.close()
    found: float = ours.recv()
    process.join()
    return found


@contextmanager
def profiled(rows: int) -> Iterator[None]:
    """Prints what took the most time, in the functions themselves, where any rows are asked for."""
    if not rows:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).sort_stats("tottime").print_stats(rows)


def show(name: str, *, large: bool, repeat: int, memory: bool) -> None:
    case = case_of(name, large=large)
    found = [measure(case) for _ in range(repeat)]
    unit = Clock.median([one.unit for one in found])
    for what, goal in GOALS.items():
        seconds = statistics.median(one.checks[what].wall for one in found)
        wall = [one.checks[what].wall / one.unit.wall for one in found]
        processor = statistics.median(one.checks[what].processor / one.unit.processor for one in found)
        most = f"{peak(what, name, large=large):8.1f}" if memory else f"{'':8s}"
        listed = " ".join(f"{ratio:.1f}" for ratio in sorted(wall))
        print(
            f"{name:8s}{what:12s}{unit.wall:9.3f}{seconds:9.2f}{statistics.median(wall):8.1f}{goal:6.0f}"
            f"{processor:11.1f}{most}   {listed}",
            flush=True,
        )
    for step in found[0].steps:
        share = statistics.median(one.steps.get(step, 0.0) / one.unit.wall for one in found)
        print(f"{'':8s}  {share:6.2f}  {step}")


def _quiet_transformers() -> None:
    """It tells of ids of a vocabulary that was made smaller."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,bert,vit,resnet")
    parser.add_argument("--large", action="store_true", help="GPT-2 of 124M parameters, the others' base sizes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, help="print this many functions of a whole check by time")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    _quiet_transformers()
    torch.set_num_threads(arguments.threads)
    print(
        f"{'model':8s}{'what':12s}{'unit s':>9s}{'s':>9s}{'units':>8s}{'goal':>6s}{'processor':>11s}{'memory':>8s}"
        "   units of each run"
    )
    for name in arguments.models.split(","):
        show(name, large=arguments.large, repeat=arguments.repeat, memory=arguments.memory)
        with profiled(arguments.profile):
            if arguments.profile:
                check_whole(case_of(name, large=arguments.large), Steps())


if __name__ == "__main__":
    main()
