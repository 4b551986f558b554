import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="run the tests of faults, and print what each led to")


@pytest.fixture
def fault_row(record_property):
    """fault_row(fault, phase, witness that it happened, what it led to): a row of the table of faults."""
    return lambda *cells: record_property("fault", cells)


def pytest_collection_modifyitems(config, items):
    if config.getoption("fault_table", default=False):
        chosen = [item for item in items if "fault_row" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("fault_table", default=False):
        return
    terminalreporter.section("faults")
    for report in terminalreporter.getreports("passed"):
        for fault, phase, witness, outcome in (cells for name, cells in report.user_properties if name == "fault"):
            terminalreporter.write_line(
                f"{fault:<42} {phase:<9} {witness:<20} {report.duration:5.1f} s  {outcome:.200}"
            )
    for outcome in ("failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {outcome}")
