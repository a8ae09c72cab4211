"""`coordctl certs`: what it writes and says."""

from pathlib import Path

from click.testing import CliRunner

from coordinator.commands.certs import certs
from protos.certificates import Certificates
from protos.errors import InvalidArgument


def test_folders_are_named_and_good(tmp_path: Path) -> None:
    result = CliRunner().invoke(certs, [str(tmp_path / "c"), "--host", "a.example", "--host", "10.0.0.1", "--days", "2"])
    assert result.exit_code == 0, result.output
    folders = [Path(line) for line in result.stdout.splitlines()]
    assert [folder.name for folder in folders] == ["ca", "coordinator", "worker", "caller"]
    for folder in folders:
        Certificates(folder)


def test_a_second_set_in_the_same_place_is_refused(tmp_path: Path) -> None:
    assert CliRunner().invoke(certs, [str(tmp_path)]).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("tls.*")}
    result = CliRunner().invoke(certs, [str(tmp_path)])
    assert isinstance(result.exception, InvalidArgument)
    assert {path: path.read_bytes() for path in tmp_path.rglob("tls.*")} == before
