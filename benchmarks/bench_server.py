"""What the server's clients wait for: the first request; a turn whose conversation is held or not.

`PYTHONPATH=src python3 benchmarks/bench_server.py --model-path build/demo/prepared`

Starts src/serve.py on a free port and asks it by the openai package. The first turn is a long text;
the second goes on with it (its KV cache is held), or comes after another conversation (it is not).
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=ROOT / "build" / "demo" / "prepared")
    parser.add_argument("--words", type=int, default=800, help="of the first turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    command = [sys.executable, ROOT / "src" / "serve.py", "--model-path", arguments.model_path]
    started_s = time.perf_counter()
    with subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            found = (re.match(r"serving (\S+) at (\S+) ", line) for line in server.stderr)
            name, url = next(match for match in found if match).groups()
            print(f"serving after {time.perf_counter() - started_s:.1f} s")
            measure(openai.OpenAI(base_url=url, api_key="none"), name, arguments)
        finally:
            server.terminate()


def measure(client: openai.OpenAI, name: str, arguments: argparse.Namespace) -> None:
    def first_token_s(*texts: str) -> float:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        started_s = time.perf_counter()
        answer = client.chat.completions.create(
            model=name, messages=messages, max_tokens=1, temperature=0, stream=True
        )
        n_tokens = sum(bool(piece.choices[0].delta.content) for piece in answer)
        assert n_tokens, "the answer has no text"
        return time.perf_counter() - started_s

    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    text = " ".join(words[n % len(words)] for n in range(arguments.words))
    short = [first_token_s("Hello") for _ in range(2)]
    print(f"a short request: the first {short[0]:.2f} s, the second {short[1]:.2f} s")
    held, anew = [], []
    for _ in range(arguments.rounds):
        first_token_s(text)
        held.append(first_token_s(text, "I see.", "Go on."))
        first_token_s("Hello")
        anew.append(first_token_s(text, "I see.", "Go on."))
    for what, times in (("goes on", held), ("comes after another", anew)):
        each = ", ".join(f"{one:.2f}" for one in times)
        print(f"a turn that {what}: {statistics.median(times):.2f} s (of {each})")


if __name__ == "__main__":
    main()
