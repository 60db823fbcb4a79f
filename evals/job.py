"""An evaluation job: `python -m evals.job DIR`. Reads DIR/spec.json, leaves report.json, report.md and result.json."""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, assert_never

import structlog
from pydantic import BaseModel, Field, ValidationError

from gateway.jobs.workdir import WorkDirectory

from .config import Check, ForgettingCheck, LoglikelihoodCheck, ParityCheck, Suite, TargetCheck, load_suite
from .errors import EvaluationError, SuiteInvalid
from .forgetting import LOGLIKELIHOOD_DTYPE, run_forgetting, run_loglikelihood
from .gates import Verdict, combine
from .parity import load_reference, run_parity
from .report import CheckReport, Report, as_data, render
from .scene import Scene, since
from .scores import Fingerprint, ScoreCache
from .serving import Endpoint, Serving, Target
from .target import run_target

log = structlog.get_logger()


class EvaluationJob(BaseModel, frozen=True, extra="ignore"):
    """`spec.json` of an evaluation."""

    token: str
    suite_dir: Path
    suite_digest: str
    target: str
    digest: str
    adapter_dir: Path
    reference: Path
    base_model: str
    base_model_path: Path
    base_digest: str
    stable: str
    stable_digest: str
    scores_dir: Path
    look: Literal[1, 2] = 1
    threads: int | None = Field(default=None, ge=1)
    training_files: tuple[Path, ...] = ()
    engine_dtype: str = "unreported"
    batch_noise: float | None = None


def evaluate(spec: EvaluationJob, endpoint: Endpoint, work: WorkDirectory) -> Report:
    """Run the suite's checks in order, up to the first that fails or errs."""
    started, started_at = time.monotonic(), datetime.now(UTC)
    suite = load_suite(spec.suite_dir)
    if spec.look == 2 and not suite.has_larger_look:
        raise SuiteInvalid(f"suite {suite.name} declares no larger look: only forgetting checks have one")
    scene = _scene(spec, Serving(endpoint), work)
    found: list[CheckReport] = []
    for check in suite.ordered:
        found.append(_run(scene, check))
        work.say(f"{found[-1].name}: {found[-1].verdict}: {found[-1].reason}")
        if found[-1].verdict in (Verdict.FAILED, Verdict.ERROR):
            break
    return _report(spec, suite, scene, found, started_at, since(started))


def _run(scene: Scene, check: Check) -> CheckReport:
    match check:
        case ParityCheck():
            return run_parity(scene, check)
        case TargetCheck():
            return run_target(scene, check)
        case ForgettingCheck():
            return run_forgetting(scene, check)
        case LoglikelihoodCheck():
            return run_loglikelihood(scene, check)
        case unreachable:
            assert_never(unreachable)


def _scene(spec: EvaluationJob, serving: Serving, work: WorkDirectory) -> Scene:
    """One question to the candidate tells whether it is served, and by what engine."""
    candidate = Target(spec.target, spec.digest)
    prompt = load_reference(spec.reference, digest=spec.digest).prompts[0]
    (first,) = serving.next_tokens(candidate, [(prompt.token_ids, prompt.candidates)])
    harness = f"lm-eval {version('lm-eval')}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return Scene(
        folder=spec.suite_dir, serving=serving, candidate=candidate,
        base=Target(spec.base_model, spec.base_digest), stable=Target(spec.stable, spec.stable_digest),
        cache=ScoreCache(spec.scores_dir),
        fingerprint=Fingerprint(
            backend="gateway", base_digest=spec.base_digest, engine=first.engine, dtype=spec.engine_dtype, harness=harness,
        ),
        local_fingerprint=Fingerprint(
            backend="hf+peft", base_digest=spec.base_digest, engine=libraries, dtype=LOGLIKELIHOOD_DTYPE, harness=harness,
        ),
        base_path=spec.base_model_path, candidate_dir=spec.adapter_dir, reference=spec.reference,
        training_files=spec.training_files, look=spec.look, say=lambda text: work.say(text),
    )  # fmt: skip


def _report(
    spec: EvaluationJob, suite: Suite, scene: Scene, found: list[CheckReport], started_at: datetime, seconds: float
) -> Report:
    verdict = combine([check.verdict for check in found])
    deciding = [check for check in found if check.verdict is verdict]
    return Report(
        target=spec.target, digest=spec.digest, suite=suite.name, suite_digest=spec.suite_digest,
        base_model=spec.base_model, stable=spec.stable, look=spec.look, verdict=verdict, batch_noise=spec.batch_noise,
        reason="; ".join(f"{check.name}: {check.reason}" for check in deciding), fingerprint=scene.fingerprint,
        checks=tuple(found), not_run=tuple(check.name for check in suite.ordered[len(found) :]),
        started_at=started_at, seconds=seconds,
    )  # fmt: skip


def run(directory: Path, endpoint: Endpoint) -> None:
    """Evaluate and leave the result. What cannot be evaluated is told with a reason code; a bug is left to crash."""
    work = WorkDirectory(directory)
    raw = work.spec()
    try:
        spec = EvaluationJob.model_validate(raw)
    except ValidationError as error:
        work.finish(str(raw.get("token", "")), ok=False, error_code="bad_spec", error_message=str(error))
        return
    if spec.threads:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)  # read when torch is imported, which happens later if at all
    try:
        report = evaluate(spec, endpoint, work)
    except EvaluationError as error:
        log.error("evaluation not finished", code=error.code, reason=error.message)
        work.finish(spec.token, ok=False, error_code=error.code, error_message=error.message)
        return
    (directory / "report.json").write_text(report.model_dump_json(indent=2))
    (directory / "report.md").write_text(render(report))
    data = {
        "verdict": report.verdict, "reason": report.reason, "fingerprint": report.fingerprint.digest,
        "looks": report.look, "report": as_data(report),
    }  # fmt: skip
    work.finish(spec.token, ok=True, data=data)


def main() -> None:
    """Entry point of the job's process."""
    run(Path(sys.argv[1]), Endpoint(os.environ["TURNOUT_URL"], os.environ.get("TURNOUT_API_KEY")))


if __name__ == "__main__":
    main()
