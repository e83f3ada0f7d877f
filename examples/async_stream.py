"""Follow several jobs at once with asyncio; each line is printed when its job has ended.

gristmill up --model smollm2-135m            # in another terminal
python examples/async_stream.py "Once upon a time" "In the beginning" "It was a dark and stormy night"
"""

import asyncio
import sys

from gristmill.producer import AsyncClient


async def tell(client: AsyncClient, prompt: str) -> str:
    job = await client.submit(prompt, max_tokens=24, temperature=0.0, stream=True)
    text = prompt
    async for chunk in job.stream():
        text += chunk.text
    return text


async def main() -> None:
    prompts = sys.argv[1:] or ["Once upon a time", "In the beginning", "It was a dark and stormy night"]
    async with AsyncClient() as client:
        for story in asyncio.as_completed([tell(client, prompt) for prompt in prompts]):
            print(repr(await story))


if __name__ == "__main__":
    asyncio.run(main())
