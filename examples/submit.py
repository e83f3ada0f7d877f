"""Send a prompt and show the answer as it is made.

gristmill up --model smollm2-135m            # in another terminal
python examples/submit.py "Why is the sky blue?"
"""

import sys

from gristmill.producer import Client


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    with Client() as client:  # GRISTMILL_BROKER_URL, or the stack that `gristmill up` runs
        job = client.submit(
            messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0.0, stream=True
        )
        for warning in job.warnings:
            print("warning:", warning, file=sys.stderr)
        for chunk in job.stream():
            print(chunk.text, end="", flush=True)
        result = job.result()
        print(f"\n[{result.usage.completion_tokens} tokens, {result.finish_reason}]", file=sys.stderr)


if __name__ == "__main__":
    main()
