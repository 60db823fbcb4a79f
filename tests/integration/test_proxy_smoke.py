from pathlib import Path
from tests.fakes.stack import Stack, chat_body

async def test_smoke(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        await stack.add_version(is_promoted=True)
        async with stack.client("inference") as client:
            r = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))
            print(r.status_code, r.text, r.headers)
            r = await client.post("/v1/chat/completions", json=chat_body(model="support@1", stream=True))
            print(r.status_code, r.text, r.headers)
            r = await client.get("/readyz")
            print(r.status_code, r.text)
            r = await client.get("/metrics")
            print(r.status_code, r.text[:3000])
            r = await client.get("/v1/models")
            print(r.text)
            r = await client.get("/v1/nope"); print(r.text)
