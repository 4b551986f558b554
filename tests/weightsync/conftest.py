import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="run the tests of faults, and print what each led to")


@pytest.fixture
def fault_row(record_property):
    """fault_row(fault, phase, witness that it happened, outcome, seconds): a row of the table of faults. Without
    seconds, those that the test took."""
    return lambda *cells, seconds=None: record_property("fault", (*cells, seconds))


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
        for fault, phase, witness, outcome, seconds in (x for name, x in report.user_properties if name == "fault"):
            took = report.duration if seconds is None else seconds
            terminalreporter.write_line(f"{fault:<42} {phase:<9} {witness:<20} {took:5.1f} s  {outcome:.200}")
    for outcome in ("failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {outcome}")
