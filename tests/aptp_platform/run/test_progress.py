"""Progress lines: what is printed is what is read back."""

import pytest

from aptp_platform.run.progress import Line, Progress, parse_line


def test_a_printed_line_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("finetune-00", 3) as progress:
        progress.update(1, loss=0.123456, network="00")
        progress.update(3)
    first, last = map(parse_line, capsys.readouterr().out.splitlines())
    assert first == Line("finetune-00", 1, 3, "loss=0.1235 network=00")
    assert last == Line("finetune-00", 3, 3, "")


@pytest.mark.parametrize("text", ["[prune] reused: made from the same config", "prune 1/2", "[prune] 1/2x"])
def test_other_lines_are_none(text: str) -> None:
    assert parse_line(text) is None
