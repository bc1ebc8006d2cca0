"""The table of faults that a user reads is that of the tests."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from fault_tally import fault_rows
from table import BEGIN, END, PAGE, marked_tests, page_with, table

MARKED = """
import pytest

@pytest.mark.slow
@pytest.mark.fault("a file "
                   "is gone", "a sentence")
def test_one(): ...

class Test:
    @pytest.mark.fault("another", "another")
    def test_two(self): ...

def test_three(): ...
"""


def test_the_page_has_the_table_of_the_tests():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == page_with(table(), page), "run: python tests/faults/table.py --write"


def test_marks_are_read_where_they_stand(tmp_path):
    file = tmp_path / "test_made_up.py"
    file.write_text(MARKED)
    assert list(marked_tests(file)) == [
        ("a file is gone", "a sentence", "test_made_up.test_one"),
        ("another", "another", "test_made_up.test_two"),
    ]
    file.write_text(MARKED.replace('"another", "another"', '"another"'))
    with pytest.raises(ValueError, match=r"test_made_up.py:10: fault takes two plain texts"):
        list(marked_tests(file))


def test_results_are_of_tests_with_all_their_cases():
    def report(test: str, *texts: str):
        return SimpleNamespace(nodeid=f"tests/x/test_y.py::{test}", user_properties=texts)

    one, two = ("fault", ["a", "b"]), ("fault", ["c", "d"])
    stats = {
        "": [report("test_a[1]", one)],
        "passed": [report("test_a[1]", one), report("test_b[1]", two), report("test_z")],
        "failed": [report("test_a[2]", one)],
        "skipped": [report("test_b[2]", two), report("test_c", two)],
        "error": [report("test_d", two)],
        "deselected": [report("test_e", two)],
    }
    assert fault_rows(stats) == {
        ("a", "b", "test_y.test_a"): "NOT as expected",
        ("c", "d", "test_y.test_b"): "as expected",
        ("c", "d", "test_y.test_c"): "not run",
        ("c", "d", "test_y.test_d"): "NOT as expected",
    }


def test_a_run_in_several_processes_ends_with_the_tally(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from fault_tally import note_faults, pytest_terminal_summary\n"
        "def pytest_collection_modifyitems(items): note_faults(items)\n"
    )
    (tmp_path / "test_y.py").write_text(
        'import pytest\n@pytest.mark.fault("a", "b")\ndef test_a(): pass\n'
    )
    options = ["-p", "xdist", "-p", "no:cacheprovider", "-m", "", "-n", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PAGE.parents[1] / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert "a | b | test_y.test_a | as expected\nfaults: 1 as expected, 0 not, 0 not run" in (
        done.stdout
    )
