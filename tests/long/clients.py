"""Clients that never stop: what they were told, and what must hold of the server that told them so."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gateway.errors import Refused
from gateway.registry.artifacts import Artifacts
from gateway.settings import Settings
from tests.corpus import CONFIG, WEIGHTS, make_adapter

from .served import BROKEN, LOOK_S, Broken, Served

CHUNKS = 16
SWEPT_WITHIN_S = 20.0


@dataclass
class Clients:
    """Whoever uses the server, all the time: what they were told, and what was wrong with it."""

    served: Served
    random: random.Random
    published: dict[str, str] = field(default_factory=dict)  # name -> digest, as acknowledged
    moves: list[dict[str, Any]] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    quiet: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by whoever changes state
    publishing: asyncio.Event = field(default_factory=asyncio.Event)
    max_versions: int = 30

    def start(self, *work: Callable[[], Awaitable[None]]) -> None:
        """Do each of these again and again."""
        self.tasks += [asyncio.create_task(self._for_ever(each)) for each in work]

    async def stop(self) -> None:
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                raise found

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except BROKEN:
                self.statuses["broken"] += 1
                await asyncio.sleep(LOOK_S)

    # ---- Completions

    def any_model(self) -> str:
        """A route, the base model, or a version that was ready once."""
        routes = {name.partition("@")[0] for name in self.ready}
        return self.random.choice([self.served.base.name, *sorted(routes), *sorted(routes), *self.ready])

    def body(self, model: str, **fields: Any) -> dict[str, Any]:
        text = f"fake:chunks={CHUNKS} fake:delay_ms=4 {self.random.random()}"
        return {"model": model, "messages": [{"role": "user", "content": text}], **fields}

    def identity(self, headers: Any) -> str:
        """What answers, as the headers have it: the fake engine begins every answer with that name."""
        version: str = headers["x-turnout-version"]
        if version == self.served.base.name:
            return version
        adapter, _, number = version.partition("@")
        return f"{adapter}.v{number}.{headers['x-turnout-digest'][:12]}"

    async def stream(self) -> None:
        """One stream, to its end."""
        url = f"{self.served.settings.url}/v1/chat/completions"
        model = self.any_model()
        async with self.served.http.post(url, json=self.body(model, stream=True)) as answer:
            self.note_status(answer.status, model)
            if answer.status != 200:
                await self.pause(answer.status)
                return
            events: list[bytes] = []
            try:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        events.append(line[6:].strip())
            finally:
                self.check_stream(self.identity(answer.headers), events)

    def check_stream(self, identity: str, events: list[bytes]) -> None:
        """By whom, and whether an end that is told is the end."""
        is_done, is_failed, text, tokens = False, False, "", 0
        for event in events:
            if event == b"[DONE]":
                is_done = True
                continue
            found = json.loads(event)
            if "error" in found:
                is_failed = True
                continue
            for choice in found["choices"]:
                content = choice["delta"].get("content")
                text, tokens = text + (content or ""), tokens + bool(content)
        whole = f"{identity}|"
        if text[: len(whole)] != whole[: len(text)]:
            self.wrong.append(f"{identity} answered {text[:80]!r}")
        if is_done and (is_failed or tokens != CHUNKS):
            self.wrong.append(f"a stream of {tokens} tokens, failed={is_failed}, was told to be done")
        self.statuses["streams done" if is_done else "streams cut"] += 1

    async def ask(self) -> None:
        """One answer as a whole."""
        url, model = f"{self.served.settings.url}/v1/chat/completions", self.any_model()
        async with self.served.http.post(url, json=self.body(model)) as answer:
            self.note_status(answer.status, model)
            found = await answer.json()
            if answer.status == 200:
                text = found["choices"][0]["message"]["content"]
                if not text.startswith(f"{self.identity(answer.headers)}|"):
                    self.wrong.append(f"{self.identity(answer.headers)} answered {text[:80]!r}")
            await self.pause(answer.status)

    def note_status(self, status: int, model: str) -> None:
        """Good, or unavailable for a while."""
        self.statuses[str(status)] += 1
        if status not in (200, 502, 503):
            self.wrong.append(f"{model} was answered with {status}")

    async def pause(self, status: int) -> None:
        """As a client does that is told to try again in a moment."""
        if status >= 500:
            await asyncio.sleep(LOOK_S)

    # ---- Changes

    async def publish(self) -> None:
        """A version, new or not; sent again after a broken connection, it is the same one."""
        await asyncio.sleep(self.random.uniform(0.2, 0.8))
        seed = self.random.randrange(1, self.max_versions + 1)
        adapter = ("support", "billing")[seed % 2]
        folder = self.served.settings.home.parent / "sources" / str(seed)
        if not folder.exists():
            await asyncio.to_thread(make_adapter, folder, self.served.base, seed=seed)
        form = aiohttp.FormData()
        for name, file in (("adapter_config", CONFIG), ("adapter_model", WEIGHTS)):
            form.add_field(name, (folder / file).read_bytes(), filename=file)
        url = f"{self.served.settings.url}/api/adapters/{adapter}/versions"
        async with self.quiet:
            self.publishing.set()
            try:
                async with self.served.http.post(url, data=form) as answer:
                    found = await answer.json()
            finally:
                self.publishing.clear()
        self.statuses[f"publish {answer.status}"] += 1
        if answer.status not in (200, 201):
            if answer.status != 503:
                self.wrong.append(f"publish came to {answer.status} {found}")
            return
        known = self.published.setdefault(found["full_name"], found["digest"])
        if known != found["digest"]:
            self.wrong.append(f"{found['full_name']} was {known} and is {found['digest']}")

    async def move(self) -> None:
        """Promote something that is loaded, or roll back."""
        await asyncio.sleep(self.random.uniform(0.05, 0.3))
        route = self.random.choice(["support", "billing"])
        mine = [name for name in self.ready if name.startswith(f"{route}@")]
        if mine and self.random.random() < 0.6:
            path, body = "promote", {"target": self.random.choice(mine), "force": True, "reason": "test"}
        else:
            path, body = "rollback", {"further": True}
        async with self.quiet:
            status, found = await self.served.post(f"/api/routes/{route}/{path}", **body)
        self.statuses[f"{path} {status}"] += 1
        if status == 200:
            self.moves.append({"route": route, "revision": found["revision"], "stable": found["moved_to"]})
        elif status not in (409, 503):
            self.wrong.append(f"{path} of {route} came to {status} {found}")

    def look_for_ready(self) -> None:
        """Which versions may be asked for."""
        rows = self.served.rows("SELECT engine_name FROM residency WHERE state = 'ready'")
        held = {row["engine_name"] for row in rows}
        self.ready = [
            name for name, digest in self.published.items() if f"{name.replace('@', '.v')}.{digest[:12]}" in held
        ]

    async def has_both(self) -> bool:
        """Whether both adapters have a version that is loaded."""
        self.look_for_ready()
        return {name.partition("@")[0] for name in self.ready} == {"support", "billing"}

    # ---- What must hold when nothing changes

    async def check_swept(self) -> None:
        """A moment comes in which nothing is half written: what a dead process left is gone, the living do not stay."""

        async def is_swept() -> bool:
            return temporary_files(self.served.settings) == []

        await self.served.until(is_swept, f"{temporary_files(self.served.settings)} are gone", SWEPT_WITHIN_S)

    def check(self) -> None:
        """Nothing acknowledged is lost, nothing is half there, one engine runs."""
        served, found = self.served, [*self.wrong]
        versions = {f"{row['adapter']}@{row['version']}": row for row in served.rows("SELECT * FROM adapter_versions")}
        for name, digest in self.published.items():
            if name not in versions or versions[name]["digest"] != digest:
                found.append(f"{name}, which was acknowledged, is {versions.get(name)}")
            elif versions[name]["state"] not in ("received", "verified"):
                found.append(f"{name} is {versions[name]['state']}: {versions[name]['state_reason']}")
        found += self._lost_moves()
        found += self._half_published({row["digest"] for row in versions.values()})
        engines = served.marked(":engine-0:")
        if len(engines) != 1:
            found.append(f"engines: {engines}")
        if found:
            raise Broken("\n".join(found[:20]) + "\n" + served.log())

    def _lost_moves(self) -> list[str]:
        found = []
        rows = self.served.rows("SELECT subject, after FROM audit WHERE action IN ('route.promote', 'route.rollback')")
        audited = [(row["subject"], json.loads(row["after"])) for row in rows]
        known = {(route, after["revision"]): after["stable"] for route, after in audited}
        for move in self.moves:
            if known.get((move["route"], move["revision"])) != move["stable"]:
                found.append(f"{move} was acknowledged and is not in the audit log")
        for row in self.served.rows("SELECT name, revision, stable FROM routes"):
            moved = sorted(revision for route, revision in known if route == row["name"])
            if moved != [*range(2, row["revision"] + 1)]:
                found.append(f"{row['name']} is at revision {row['revision']}, audited are {moved}")
            if moved and known[row["name"], moved[-1]] != row["stable"]:
                found.append(f"{row['name']} is on {row['stable']}, moved last to {known[row['name'], moved[-1]]}")
        return found

    def _half_published(self, digests: set[str]) -> list[str]:
        settings = self.served.settings
        artifacts = Artifacts(settings.artifacts_dir, settings.manifests_dir)
        found = []
        for digest in digests | {path.name for path in settings.artifacts_dir.glob("??/*")}:
            try:
                artifacts.verify(digest)
            except Refused as error:
                found.append(error.message)
        return found


def temporary_files(settings: Settings) -> list[Path]:
    """What only lives while something is being written."""
    patterns = ("artifacts/.staging/*", "*.tmp", "references/*.tmp", "manifests/*.tmp", "turnout.db-journal.*")
    return [path for pattern in patterns for path in settings.home.glob(pattern)]
