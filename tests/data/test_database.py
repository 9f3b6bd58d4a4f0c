"""FiftyOne's database: whose it is, and that one which is slow to come up is waited for. No server is started."""

from types import SimpleNamespace

import fiftyone.core.odm.database as odm
import fiftyone.service.util as service
import pytest
from fiftyone.core.config import FiftyOneConfigError
from fiftyone.core.service import ServiceListenTimeout

from harmony.core.errors import UserError
from harmony.data.sources.open_images import database


@pytest.fixture
def servers(monkeypatch):
    """The folders of the databases whose servers seem to run."""
    folders = []
    words = ["python", "main.py", "--51-service", "db", "--multi", "mongod", "--dbpath"]

    def find_processes(arguments):
        return [SimpleNamespace(cmdline=lambda folder=folder: [*words, folder]) for folder in folders]

    monkeypatch.setattr(service, "find_processes_by_args", find_processes)
    monkeypatch.setattr(database, "END_SECONDS", 0)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(database, "slow_services", [])
    monkeypatch.setattr(odm, "_db_service", None)
    monkeypatch.setattr(odm, "_disconnect", lambda: None)
    monkeypatch.delenv("FIFTYONE_PRIVATE_DATABASE_PORT", raising=False)
    return folders


def make_fiftyone(folder, *results):
    """A FiftyOne whose attempts to connect end as told, and the list of them."""
    attempts, left = [], iter(results)

    def list_datasets():
        attempts.append(odm._db_service)
        result = next(left)
        if isinstance(result, Exception):
            odm._db_service = result  # the service that did not come up in time
            raise result

    config = SimpleNamespace(database_uri=None, database_dir=str(folder))
    return SimpleNamespace(config=config, list_datasets=list_datasets), attempts


def test_the_server_of_another_folder_is_not_joined(servers, tmp_path):
    """Guards other databases: FiftyOne would join any server of the user; one line says whose, before it does."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    fiftyone, attempts = make_fiftyone(mine, None, None)
    servers.append(str(mine / ".." / "mine"))
    database.connect(fiftyone)
    assert len(attempts) == 1, "the server of the same folder is joined"
    servers.append(str(other))
    with pytest.raises(UserError, match=f"would join the database in {other}, .* instead of that in {mine}: end"):
        database.connect(fiftyone)
    assert len(attempts) == 1, "nothing was written"


def test_a_slow_database_is_waited_for(servers, tmp_path):
    """Guards ``browse`` and ``prepare`` on a busy machine: another try joins the service once it is up, and the first
    is not dropped, because that would end it.
    """
    slow = ServiceListenTimeout("mongod")
    fiftyone, attempts = make_fiftyone(tmp_path, slow, ConnectionError("refused"), None)
    database.connect(fiftyone)
    assert attempts == [None] * 3 and database.slow_services[0] is slow


@pytest.mark.parametrize(
    "failure, seconds",
    [(ServiceListenTimeout("mongod"), -1), (FiftyOneConfigError("no mongod"), 90), (PermissionError(), 90)],
)
def test_a_database_that_does_not_come_is_one_line(servers, tmp_path, monkeypatch, failure, seconds):
    """Guards the end of waiting: after its time, and at once for what time does not mend."""
    monkeypatch.setattr(database, "WAIT_SECONDS", seconds)
    fiftyone, attempts = make_fiftyone(tmp_path, failure, failure)
    with pytest.raises(UserError, match=f"FiftyOne's database did not start .* in {tmp_path}; python -m harmony.doc"):
        database.connect(fiftyone)
    assert len(attempts) == 1
