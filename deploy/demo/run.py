"""The whole loop for real, as the commands that a user would type: `make demo`.

    python -m deploy.demo.run [--keep] [--seed 0]

Everything lands in build/demo; an earlier run's is replaced. Ends with 0 when every promise of the report held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from gateway.client import Client
from gateway.client_models import Job

from .commands import Commands, DemoFailed, Server
from .data import DemoData, make_demo_data
from .report import Value, as_table, make_rows, missed, write_report
from .speaker import KnownAnswers
from .stopping import Interrupts, adopt_orphans, below, kill_all, name_of, running_in
from .suite import FORMAT, METRIC, NAME, TARGET, UNSEEN, write_suite
from .traffic import (
    Answer,
    Flow,
    Switch,
    Users,
    by_version,
    learn,
    read_emails,
    share_of,
    unsticky_users,
    watch_switch,
)

ROOT = Path(__file__).resolve().parents[2]
WORK = Path("build/demo")  # as commands show it, from the repository's root
ADAPTER = "support"
V1, V2 = f"{ADAPTER}@1", f"{ADAPTER}@2"
USERS = 30
SAMPLE = 20  # e-mails by which the demo knows what each version says
# Many wordings with few rows of each want many small steps.
ROWS_A_STEP, LOOK_EVERY = 4, 100
BAD_STEPS = 20  # of v2's training: enough to spoil every answer
# Free memory in which the engine may start while v1 is trained: the two take about 9 GiB.
ROOM_FOR_BOTH = 12 * 2**30
BEFORE, AFTER = 8, 16  # answers of the flow seen before the rollback, and requests sent after it


INCONCLUSIVE = 2  # exit code


@dataclass
class Demo:
    """One run: where things are, and what was seen so far."""

    commands: Commands
    client: Client
    seed: int
    values: dict[str, Value] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    known: KnownAnswers = field(default_factory=KnownAnswers)

    @property
    def console(self) -> Console:
        """Where the demo talks."""
        return self.commands.console

    def look(self) -> None:
        """What this machine can do."""
        with self.commands.step("doctor", "See what this machine can do"):
            self.commands.turnout("doctor")

    def make_data(self) -> DemoData:
        """Customer e-mails, the same for the same seed."""
        with self.commands.step("data", "Make the data: customer e-mails and the JSON that is right for each"):
            self.console.print(
                f"$ python -m deploy.demo.data {WORK / 'data'} --seed {self.seed}", style="bold cyan", markup=False
            )
            return make_demo_data(WORK / "data", self.seed)

    def check_data(self, data: DemoData) -> None:
        """Before anything is loaded."""
        with self.commands.step("check", "Check it before anything is loaded"):
            self.commands.turnout("data", "check", str(data.train), "--validation", str(data.validation))

    def train(self, version: str, title: str, *settings: str) -> None:
        """A bundle at `WORK`/`version`."""
        words = [word for setting in (f"adapter={ADAPTER}", *settings) for word in ("--set", setting)]
        with self.commands.step(f"train_{version}", title):
            self.commands.turnout("train", "sft", *words, "--output", str(WORK / version))

    def publish(self, version: str) -> None:
        """Until it is verified, loaded and probed."""
        with self.commands.step(f"publish_{version}", f"Publish {version}: pre-flight, verification, load, probe"):
            self.commands.turnout("publish", str(WORK / version), "--adapter", ADAPTER, "--wait")

    def set_gates(self, data: DemoData) -> None:
        """Register the suite and make it the route's gate."""
        with self.commands.step("suite", "Say what better means: a suite, as the route's gate"):
            self.commands.turnout("suite", "add", str(write_suite(WORK / "suites", data)))
            self.commands.turnout("routes", "gates", ADAPTER, "--suite", NAME)
            self.commands.turnout("eval", "power", NAME)

    def evaluate(self, target: str, *, expect: int) -> None:
        """Run the suite; the verdict is the exit code. "Cannot tell" gets the one larger look that the suite declares."""
        version = "v" + target.rpartition("@")[2]
        with self.commands.step(f"evaluate_{version}", f"Evaluate {target}: parity, target, forgetting"):
            try:
                command = ("eval", "run", target, "--suite", NAME, "--wait")
                if self.commands.turnout(*command, expect=expect, or_else=INCONCLUSIVE) == INCONCLUSIVE:
                    self.commands.turnout(*command, "--larger-look", expect=expect)
            finally:
                job = self.latest_evaluation(target)
                self.values[f"gate_{version}"] = (job.result or {}).get("verdict") if job else None
        if job and version == "v1":
            self.values.update(figures(job))

    def latest_evaluation(self, target: str) -> Job | None:
        """The newest evaluation of a version, with its report."""
        found = self.client.evaluations(target)
        return self.client.evaluation(found[0].id) if found else None

    def split(self, users: Users, data: DemoData) -> None:
        """Base against v1: each user keeps an arm."""
        with self.commands.step(
            "ab", f"A/B: half of {USERS} users on base, half on {V1}; two requests each by the OpenAI SDK"
        ):
            self.commands.turnout(
                "routes",
                "set",
                ADAPTER,
                "--variant",
                "base=50",
                "--variant",
                f"{V1}=50",
                "--reason",
                "A/B against base",
            )
            emails = read_emails(data.heldout, 2 * USERS)
            seen = users.ask_all((email, f"user-{number % USERS}") for number, email in enumerate(emails))
            self.answers += seen
            self.values["unsticky_users"] = unsticky_users(seen)
            self.values["share_v1"] = share_of(V1, seen)  # with one arm alone everybody would look sticky
            self.console.print(by_version(seen, "What the arms answered"))

    def promote(self, users: Users, data: DemoData) -> None:
        """All traffic to the version whose gate passed."""
        with self.commands.step("promote_v1", f"Promote {V1}: its gate passed"):
            self.commands.turnout("promote", ADAPTER, V1, "--reason", "better than base on held-out e-mails")
            self.sample(users, data, V1, f"Traffic on {V1}")

    def sample(self, users: Users, data: DemoData, version: str, title: str) -> float:
        """Send the sample while only `version` can answer; remember what it says. The share of exact answers."""
        seen = users.ask_all((email, f"sample-{email.number}") for email in read_emails(data.heldout, SAMPLE))
        self.answers += seen
        learn(self.known, version, seen)
        self.console.print(by_version(seen, title))
        return sum(answer.is_exact for answer in seen) / len(seen)

    def refuse(self) -> None:
        """The gate holds."""
        with self.commands.step("refuse_v2", f"Try to promote {V2}: refused"):
            self.commands.turnout("promote", ADAPTER, V2, expect=1)

    def force(self, users: Users, data: DemoData) -> None:
        """An operator may; it is on record."""
        with self.commands.step("force_v2", f"Force {V2} out all the same, on record"):
            self.commands.turnout("promote", ADAPTER, V2, "--force", "--reason", "the demo wants to see the damage")
            exact = self.sample(users, data, V2, "The damage")
            self.values["exact_match_during_damage"] = round(exact, 3)

    def roll_back(self, users: Users, data: DemoData) -> None:
        """While traffic flows; every answer is checked."""
        with self.commands.step("rollback", f"Roll back to {V1} while traffic flows"):
            with Flow(users, read_emails(data.heldout, SAMPLE)) as flow:
                if not flow.wait_for(BEFORE):
                    raise DemoFailed("no traffic flowed before the rollback")
                said = self.commands.answer("rollback", ADAPTER, "--reason", "wrong answers", "--confirm", "--json")
                moved = json.loads(said)
                shown = {
                    name: moved[name] for name in ("moved_from", "moved_to", "needs_load", "call_ms", "first_answer_ms")
                }
                self.console.print_json(data=shown)
                if not flow.wait_for(AFTER, sent_after=moved["completed_at"]):
                    raise DemoFailed("no traffic flowed after the rollback")
            switch = watch_switch(
                flow.answers,
                old=V2,
                started_at=moved["started_at"],
                completed_at=moved["completed_at"],
                known=self.known,
            )
            self.answers += flow.answers
            self.judge(switch, flow.answers)
            self.values["rollback_loads"] = int(moved["needs_load"])
            self.values["rollback_first_answer_ms"] = moved["first_answer_ms"]
            self.values["exact_match_after_rollback"] = round(self.sample(users, data, V1, "The damage is gone"), 3)

    def judge(self, switch: Switch, flow: Sequence[Answer]) -> None:
        """Put the rollback into figures and a sentence."""
        told = self.known.tells_apart({answer.email.number for answer in flow})
        # Where no e-mail tells the versions apart, nothing was checked and nothing is claimed.
        self.values["wrong_version_answers"] = len(switch.wrong) if told else None
        self.values["rollback_ms"] = round(switch.took_ms, 1)
        self.values["rollback_call_ms"] = round(switch.call_ms, 1)
        self.values["rollback_last_old_answer_ms"] = round(switch.last_old_answer_ms, 1)
        failed = sum(answer.error is not None for answer in flow)
        self.console.print(
            f"{len(flow)} requests flowed, {failed} failed; {len(told)} of {SAMPLE} e-mails tell {V1} from {V2}. The call took {switch.call_ms:.0f} ms; no request sent after "
            f"{switch.took_ms:.0f} ms was answered by {V2}; its last open answer ended after {switch.last_old_answer_ms:.0f} ms."
        )


def figures(job: Job) -> dict[str, Value]:
    """The report's figures, from an evaluation as the API gives it."""
    wanted = {
        "exact_match_base": ("base", TARGET, METRIC),
        "exact_match_few_shot": ("few_shot", TARGET, METRIC),
        "exact_match_tuned": ("candidate", TARGET, METRIC),
        "exact_match_tuned_unseen_phrasings": ("candidate", UNSEEN, METRIC),
        "valid_format_base": ("base", TARGET, FORMAT),
        "valid_format_tuned": ("candidate", TARGET, FORMAT),
    }
    report: dict[str, Any] = (job.result or {}).get("report") or {}
    scores = {
        (score["subject"], score["set"], score["metric"]): round(float(score["value"]), 4)
        for check in report.get("checks", ())
        for score in check.get("scores", ())
    }
    return {name: scores.get(key) for name, key in wanted.items()}


def train_first(demo: Demo, data: DemoData, title: str) -> None:
    """The version that is good."""
    demo.train(
        "v1", title, f"dataset={data.train}", f"validation={data.validation}",
        f"batch_size={ROWS_A_STEP}", f"checkpoint_every={LOOK_EVERY}",
    )  # fmt: skip


def play(demo: Demo, serve: Server, data: DemoData) -> None:
    """Every step that needs the server."""
    with demo.commands.step("ready", "Wait until the engine serves"):
        serve.check_alive()
        demo.commands.turnout("status", "--wait")
    users = Users(demo.client.url, ADAPTER)
    demo.publish("v1")
    demo.set_gates(data)
    demo.evaluate(V1, expect=0)
    demo.split(users, data)
    demo.promote(users, data)
    demo.train(
        "v2", "Train a bad v2: on from v1, on rows whose answers a faulty join has shuffled",
        f"dataset={data.shuffled}", f"init_from={WORK / 'v1'}", f"parent={V1}", f"max_steps={BAD_STEPS}",
    )  # fmt: skip
    demo.publish("v2")
    demo.evaluate(V2, expect=1)
    demo.refuse()
    demo.force(users, data)
    demo.roll_back(users, data)
    demo.values["failed_requests"] = sum(answer.error is not None for answer in demo.answers)
    with demo.commands.step("audit", "Who did what, and why"):
        demo.commands.turnout("audit", "--limit", "12")


@contextmanager
def serving(commands: Commands, *, port: int, keep: bool) -> Iterator[Server]:
    """The server, stopped at the end with nothing left behind; kept when asked for and all went well."""
    home = WORK / "home"
    arguments = ("--home", str(home), "--port", str(port), "--auth", "none")
    server = Server(commands, arguments, home=home.resolve(), log=WORK / "serve.log", keep=keep)
    commands.check = server.check_alive
    try:
        yield server
    except BaseException:
        server.stop()
        raise
    if not keep:
        with commands.step("stop", "Stop the server; nothing may be left running"):
            server.stop()


def run(console: Console, interrupts: Interrupts, *, seed: int, keep: bool) -> int:
    """The demo; 0 when every promise held."""
    started = time.monotonic()
    os.chdir(ROOT)
    left = running_in((WORK / "home").resolve())
    if left:
        raise DemoFailed(
            f"a server of an earlier demo still runs (pid {left[0].pid}): stop it with `kill {left[0].pid}`"
        )
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    port = free_port()
    commands = Commands(root=ROOT, environment=environment(port), console=console, interrupts=interrupts)
    with Client(f"http://127.0.0.1:{port}") as client:
        demo = Demo(commands, client, seed)
        demo.look()
        data = demo.make_data()
        demo.check_data(data)
        has_room = psutil.virtual_memory().available >= ROOM_FOR_BOTH
        if not has_room:
            train_first(demo, data, "Train v1")
        with serving(commands, port=port, keep=keep) as serve:
            if has_room:
                train_first(demo, data, "Train v1, while the engine starts")
            play(demo, serve, data)
    demo.values["wall_s"] = round(time.monotonic() - started, 1)
    return finish(demo, port=port, keep=keep)


def finish(demo: Demo, *, port: int, keep: bool) -> int:
    """Write the report, show it, and say where to go from here."""
    rows = make_rows(demo.values, demo.commands.seconds)
    write_report(WORK / "report.json", rows)
    demo.console.print(as_table(rows))
    demo.console.print("\nLook around:" if keep else "\nStart it again and look around:")
    for line in where_to_go(port, keep=keep):
        demo.console.print(f"  $ {line}", style="cyan", markup=False)
    demo.console.print(f"\nThe figures are in {WORK / 'report.json'}; the demo is explained in docs/tutorial/demo.md.")
    broken = missed(rows)
    for line in broken:
        demo.console.print(f"missed: {line}", style="red", markup=False)
    return 1 if broken else 0


def where_to_go(port: int, *, keep: bool) -> list[str]:
    """What to type next, in a shell that has seen nothing of the demo."""
    lines = [] if shutil.which("turnout") else [f"source {relative(Path(sys.prefix))}/bin/activate"]
    lines.append(f"export TURNOUT_URL=http://127.0.0.1:{port} TURNOUT_HOME={WORK / 'home'}")
    if not keep:
        lines.append(f"turnout serve --port {port} --auth none &")
    return [
        *lines,
        "turnout status",
        f"turnout adapters show {V2}",
        f"turnout eval show --target {V2}",
        "turnout audit",
    ]


def relative(path: Path) -> Path:
    """As short as it can be typed here."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def environment(port: int) -> dict[str, str]:
    """The user's, without settings of another server, and with this one's address."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURNOUT_")}
    chosen = {
        "TURNOUT_HOME": str((WORK / "home").resolve()),
        "TURNOUT_URL": f"http://127.0.0.1:{port}",
        "TURNOUT_PORT": str(port),
    }
    return kept | chosen | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def what_is_left(interrupts: Interrupts) -> str:
    """End whatever this process started and still runs, and say how that went."""
    with interrupts.held():
        left = kill_all(lambda: below(os.getpid()))
    if not left:
        return "nothing is left running"
    pids = " ".join(str(process.pid) for process in left)
    return f"still running, though killed: {'; '.join(map(name_of, left))}; look at them with `ps -fp {pids}`"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    interrupts = Interrupts()
    interrupts.listen()
    adopt_orphans()
    try:
        return run(console, interrupts, seed=options.seed, keep=options.keep)
    except DemoFailed as error:
        code, why, style = 1, f"The demo stopped: {error}", "red"
    except KeyboardInterrupt:
        code, why, style = 130, "Interrupted", "yellow"
    console.print(f"{why}; {what_is_left(interrupts)}.", style=style, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
