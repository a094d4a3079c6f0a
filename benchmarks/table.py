"""Ratios of the recorded runs, against their targets, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from benchmarks.arms import program_of
from benchmarks.records import Record, Run, Step
from benchmarks.workloads import ARMS, ARMS_IN_FLOAT32, TARGETS, Target, Workload

GB = 1e9


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    least: float
    most: float
    rounds: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and range; None of nothing."""
    return Spread(median(values), min(values), max(values), len(values)) if values else None


def timed(run: Run, workload: Workload) -> list[Step]:
    """Return the steps that count."""
    return run.steps[workload.warmup :]


def seconds(run: Run, record: Record) -> float:
    """Return the total time of the steps that count."""
    return sum(step.seconds for step in timed(run, record.workload))


def memory(run: Run, record: Record) -> float:
    """Return the peak of the device, or the peak resident set above that of the program's imports, in bytes."""
    return run.peak_device if run.peak_device is not None else run.peak_rss - record.baselines[program_of(run.arm)]


def mfu(run: Run, record: Record) -> float | None:
    """Return the share of the peak over all timed steps, each weighted by its time; None where it is not told."""
    steps = timed(run, record.workload)
    told = [(step.mfu, step.seconds) for step in steps if step.mfu is not None]
    if len(told) < len(steps):
        return None
    return sum(share * time for share, time in told) / sum(time for _, time in told)


def measured(target: Target, record: Record) -> Spread | None:
    """Return a target's figure: a ratio within each round, then median and range of the rounds; None if not run."""
    rounds = {number: {run.arm: run for run in record.runs if run.round == number} for number in _rounds(record)}
    values = [value for runs in rounds.values() if (value := _value(target, runs, record)) is not None]
    return spread(values)


def _rounds(record: Record) -> list[int]:
    return sorted({run.round for run in record.runs})


def _value(target: Target, runs: dict[str, Run], record: Record) -> float | None:
    over, under = runs.get(target.over), runs.get(target.under or target.over)
    if over is None or under is None:
        return None
    if target.measure == "mfu":
        return mfu(over, record)
    measure = seconds if target.measure == "seconds" else memory
    return measure(over, record) / measure(under, record)


def verdict(target: Target, found: Spread | None) -> str:
    """Return whether the median meets `must` and `aim`."""
    if found is None:
        return "not run"
    if target.must is None or target.aim is None:
        return ""
    sign = 1 if target.more_is_better else -1
    if sign * found.median >= sign * target.aim:
        return "aim met"
    return "met" if sign * found.median >= sign * target.must else "**missed**"


def steady(run: Run, record: Record) -> float | None:
    """Return seconds a token of the last dropped step by the median of the timed ones: 1 says that warm-up was over.

    Tokens are those of prompt + chosen and prompt + rejected, without padding, for both programs.
    """
    workload, lengths = record.workload, record.pairs["lengths"]
    if not workload.warmup:
        return None
    tokens = [
        sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths[at : at + workload.pairs])
        for at in range(0, workload.all_steps * workload.pairs, workload.pairs)
    ]
    costs = [step.seconds / count for step, count in zip(run.steps, tokens, strict=True)]
    return costs[workload.warmup - 1] / median(costs[workload.warmup :])


def write(record: Record) -> str:
    """Return the whole report of a benchmark."""
    return "\n".join([*_heading(record), "", *_targets(record), "", *_arms(record), "", *_setting(record), ""])


def _heading(record: Record) -> Iterator[str]:
    versions, machine = record.versions, record.machine
    precision = "" if record.workload.precision == "bf16" else f" in {record.workload.dtype}"
    against = f" against TRL {versions['trl']}" if _has_trl(record) else ""
    yield f"# {record.workload.name}{precision}: dpo_lightning{against}"
    yield ""
    programs = ", ".join(f"{name} {versions[name]}" for name in ("dpo_lightning", "torch", "transformers", "peft"))
    yield f"{record.started}; {programs}."
    yield f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; threads: {machine['threads']}."
    if record.workload.device != "cpu":
        yield f"One {machine['accelerator']}; memory is what tensors took there at the most."
    elif _has_trl(record):
        yield "CPU alone: there TRL's fused head has no kernel of its own, and scores every position if not told other."
    if missing := len(record.missing()):
        yield ""
        yield f"**Unfinished**: {missing} of {record.rounds * len(record.workload.arms)} runs are missing."


def _targets(record: Record) -> Iterator[str]:
    judged = record.workload.precision == "bf16"
    yield "| | median | spread |" + " must | aim | |" * judged
    yield "|---|---|---|" + "---|---|---|" * judged
    for target in targets_of(record.workload):
        found = measured(target, record)
        show = _percent if target.measure == "mfu" else _times
        cells = [show(found.median), f"{show(found.least)} to {show(found.most)}"] if found else ["", ""]
        limits = ["" if limit is None else show(limit) for limit in (target.must, target.aim)]
        judgement = [*limits, verdict(target, found)] if judged else []
        yield f"| {' | '.join([target.label, *cells, *judgement])} |"
    if not judged:
        yield ""
        yield "No targets: those of this workload are for bfloat16."


def targets_of(workload: Workload) -> list[Target]:
    """Return the lines of arms that take part, without limits on CUDA or in float32: they are a CPU's in bfloat16."""
    lines = [t for t in TARGETS[workload.name] if {t.over, t.under or t.over} <= {*workload.arms}]
    if (workload.device, workload.precision) == ("cpu", "bf16"):
        return lines
    return [replace(t, label=t.label.replace("bfloat16", workload.dtype), must=None, aim=None) for t in lines]


def _times(value: float) -> str:
    return f"{value:.3g}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _arms(record: Record) -> Iterator[str]:
    columns = (
        "arm",
        "pairs/s",
        "peak RSS above imports, GB" if record.workload.device == "cpu" else "peak of the device, GB",
        "peak RSS, GB",
        "steps dropped + timed",
        "last dropped / timed (1)",
    )
    more = ("s outside the steps (2)", "load before", "mean loss")
    yield f"| {' | '.join([*columns, *more])} |"
    yield f"|{'---|' * len([*columns, *more])}"
    for arm in record.workload.arms:
        if runs := [run for run in record.runs if run.arm == arm]:
            yield _arm(arm, runs, record)
    yield ""
    yield "(1) seconds a token of the last step dropped, by the median of the timed ones: near 1 where warm-up is over."
    yield "(2) in the first round: imports, loading, tokenising, the reference's pre-pass where there is one, export."


def _arm(arm: str, runs: Sequence[Run], record: Record) -> str:
    workload = record.workload
    pairs = workload.steps * workload.pairs
    settled = [value for run in runs if (value := steady(run, record)) is not None]
    outside = runs[0].wall_seconds - sum(step.seconds for step in runs[0].steps)
    cells = [
        arm,
        _range([pairs / seconds(run, record) for run in runs], ".3f"),
        _range([memory(run, record) / GB for run in runs], ".2f"),
        _range([run.peak_rss / GB for run in runs], ".2f"),
        f"{workload.warmup} + {workload.steps}",
        _range(settled, ".2f"),
        f"{outside:.0f}",
        _range([run.load for run in runs], ".2f"),
        f"{mean(step.loss for run in runs for step in timed(run, workload)):.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _range(values: Sequence[float], form: str) -> str:
    found = spread(values)
    if found is None:
        return ""
    return f"{found.median:{form}} ({found.least:{form}} to {found.most:{form}})"


def _has_trl(record: Record) -> bool:
    return "trl" in map(program_of, record.workload.arms)


def _setting(record: Record) -> Iterator[str]:
    workload = record.workload
    mode = "LoRA r 16 on all linear layers" if workload.lora else "full fine-tuning"
    yield (
        f"`{' '.join(workload.model)}`, {mode}, learning rate {workload.lr:g}, {workload.pairs} pairs a step in file "
        f"order, {workload.dtype}; rounds: {record.rounds}, in each every arm once, one process after the other. "
        "A ratio is of the total time of the timed steps, or of the peaks of memory, of two runs of one round."
    )
    if record.pairs:  # else it was cut off before it had any
        yield ""
        yield _pairs(record)
    if record.parity:
        told = ", ".join(f"{key.replace('_', ' ')} {value:.1e}" for key, value in record.parity.items())
        yield ""
        yield f"Both in float32, first steps, largest difference: {told}."
    yield ""
    arms = ARMS if workload.precision == "bf16" else ARMS_IN_FLOAT32
    yield from (f"- `{arm}`: {arms[arm]}." for arm in workload.arms)


def _pairs(record: Record) -> str:
    pairs, lengths = record.pairs, record.pairs["lengths"]
    means = [f"{mean(row[side] for row in lengths):.0f}" for side in range(3)]
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    return (
        f"Pairs: {pairs['file']}, {pairs['distinct']} different ones, gone through "
        f"{len(lengths) / pairs['distinct']:.2g} times; rows left out up to the last one, as unusable or longer than "
        f"{record.workload.max_length} tokens: {pairs['left_out']}. Mean tokens: prompt {means[0]}, chosen {means[1]}, "
        f"rejected {means[2]}; longest sequence {longest}."
        + (" TRL's token ids are the same as ours." if _has_trl(record) else "")
    )
