"""The list of small faults fits the code and the tests that there are; tests/mutations/run.py applies it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import ROOT, Fault, faults, node

FAULTS = faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{Path(fault.file).stem}-{fault.new.strip()[:40]}")
def test_a_fault_fits_the_code_and_names_tests_that_there_are(fault: Fault) -> None:
    """Catches a fault of code that is gone, one whose test was renamed, and one that no test needs to notice."""
    code = (ROOT / fault.file).read_text(encoding="utf-8")
    assert code.count(fault.old) == 1
    if fault.file.endswith(".py"):
        compile(code.replace(fault.old, fault.new), fault.file, "exec")
    assert fault.old != fault.new
    assert fault.tests
    for test in fault.tests:
        assert node(ROOT, test)


def test_there_are_enough_faults_and_half_of_them_outside_the_algorithms() -> None:
    """Catches a list that shrinks."""
    outside = [fault for fault in FAULTS if "/algorithms/" not in fault.file]
    assert len(FAULTS) >= 80
    assert 2 * len(outside) >= len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
