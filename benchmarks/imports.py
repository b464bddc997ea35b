"""How long `import notebook_kit` takes in a fresh Python, and what it drags in.

python benchmarks/imports.py [rounds]
"""

import statistics
import subprocess
import sys

TARGET_MS = 100
HEAVY = ("torch", "transformers", "plotly", "pandas", "numpy", "ipywidgets")
CODE = f"""
import sys, time
started = time.perf_counter()
import notebook_kit
print((time.perf_counter() - started) * 1000, *(name for name in {HEAVY} if name in sys.modules))
"""


def once() -> tuple[float, list[str]]:
    """Milliseconds of one import in a fresh process, and the heavy modules it loaded."""
    words = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), words[1:]


def main(rounds: int) -> None:
    once()  # writes the byte code
    times, loaded = zip(*(once() for _ in range(rounds)), strict=True)
    median = statistics.median(times)
    verdict = "met" if median < TARGET_MS and not any(loaded) else "MISSED"
    print(f"import notebook_kit: median {median:.0f} ms of {rounds} ({min(times):.0f} to {max(times):.0f})")
    print(f"heavy modules loaded: {', '.join(loaded[0]) or 'none'}; target below {TARGET_MS} ms and none: {verdict}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
