import pytest

from tests.hub import faults


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_nothing_lost_and_nothing_wrong_loaded(fault, tmp_path):
    assert faults.measure(fault, tmp_path) == (fault.expected, fault.repaired)


def test_table_in_the_readme_is_current():
    rows = [faults.row(fault.name, fault.expected, fault.repaired) for fault in faults.FAULTS]
    assert faults.table(rows) in faults.README.read_text(encoding="utf-8")
