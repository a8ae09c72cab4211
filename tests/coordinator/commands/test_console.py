from __future__ import annotations

import pytest

from coordinator.commands.console import show_bytes, table_console


def test_without_a_terminal_tables_have_a_width_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert table_console().width == 200


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.50 KiB"), (3 * 2**30, "3 GiB"), (2**20 + 1, "1.00 MiB")],
)
def test_bytes_are_shown_in_their_unit(num_bytes: int, shown: str) -> None:
    assert show_bytes(num_bytes) == shown
