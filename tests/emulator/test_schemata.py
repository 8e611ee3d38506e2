"""A program in which mutants are chosen when it runs computes, for each of them, what the mutant alone computes."""

import os
import subprocess

import host_compiler
import pytest
from mutate import changes_of
from schemata import PRELUDE, schema

pytestmark = pytest.mark.skipif(bool(host_compiler.missing()), reason=str(host_compiler.missing()))

TEXT = """int found(const int* x, int n) {
  int total = 0, low = n > 3 ? 2 : 1;
  constexpr int STEP = 4 / 2;
  for (int i = 0, turn = 0; i < n && turn < 20; i += STEP, ++turn) {  // every other one
    if (i % 3 == 0 && x[i + 1 & 15] > 2)
      total += x[i & 15] * 2 -
               low;
    else if (x[i & 15] != 5 || total <= 7) total -= 1;
    int y[2] = {min(x[i & 15], 4), total};
    total += y[i & 1] - (total >= 9 ? 3 : (1));
    if (low == 2) total *= 2;
    log(false);
  }
  return total - max(low, n) + logged;
}
"""
HEAD = """#include <cstdio>
static int logged = 0;
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static void log(bool twice) { logged += twice ? 2 : 1; }
"""
CALLS = """  int x[32];
  for (int i = 0; i < 32; ++i) x[i] = i * 7 % 11;
  for (int n = 1; n < 9; ++n) { logged = 0; printf("%d ", FOUND(x, n)); }
"""


def printed(folder, name, program, mutant=0):
    source = folder / f"{name}.cpp"
    if not source.exists():
        source.write_text(program)
        subprocess.run([host_compiler.compiler(), "-w", "-fpermissive", source, "-o", folder / name], check=True)
    environment = {**os.environ, "TTR_MUTANT": str(mutant)}
    return subprocess.run([folder / name], env=environment, capture_output=True, text=True, check=True).stdout


def test_a_chosen_mutant_computes_what_it_computes_alone(tmp_path):
    found = [change for *_, change in changes_of(TEXT)]
    assert len(found) > 25
    text, left_out = schema(TEXT, found)
    # Its place must be a constant.
    assert [TEXT[change.begin : change.end] for change in left_out] == ["/ 2"]
    assert [line.count("{") for line in text.splitlines()] == [line.count("{") for line in TEXT.splitlines()]
    chosen = f"{PRELUDE}{HEAD}{text}int main() {{\n{CALLS.replace('FOUND', 'found')}}}\n"
    alone = "".join(
        f"namespace m{change.number} {{\n{TEXT[: change.begin]}{change.new}{TEXT[change.end :]}}}\n" for change in found
    )
    calls = "".join(
        f'  {{\n{CALLS.replace("FOUND", f"m{change.number}::found")}  printf("\\n");\n  }}\n' for change in found
    )
    expected = printed(tmp_path, "alone", f"{HEAD}{alone}int main() {{\n{calls}}}\n").splitlines()
    original = printed(tmp_path, "chosen", chosen)
    results = [printed(tmp_path, "chosen", chosen, change.number) for change in found]
    for change, mine, its in zip(found, results, expected, strict=True):
        assert mine == (original if change in left_out else its), change
    # Most of them make a difference here.
    assert sum(mine != original for mine in results) > 20
