"""Memory that is free again stays at hand for the next short computation."""

import subprocess
import sys

import pytest

ROUNDS = """
import resource
import numpy as np
from medcook.memory import keep_at_hand
keep_at_hand()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [np.ones(2**22, np.uint8) for _ in range(10)]
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left alone")
def test_ten_arrays_of_4_mb_come_out_of_memory_that_was_used_before():
    ran = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 500, "10240 pages of 4 kB hold them"
