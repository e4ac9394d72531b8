"""The compiler's cache lies in a folder that only the user may write to."""

import os
import stat

import pytest
import torch

from armed_pyro.engine import cache_folder
from armed_pyro.engine.cache_folder import VARIABLE, check_private, private_cache
from armed_pyro.engine.compiler import capture, compile_graph

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions are of POSIX")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of the test's own, below folders of mode 700."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path


def test_the_default_is_a_new_folder_of_mode_700(home):
    with private_cache() as folder:
        assert os.environ[VARIABLE] == str(folder)
        assert home in folder.parents
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert VARIABLE not in os.environ


def test_the_users_choice_is_taken_and_kept(home, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(home / "mine"))
    with private_cache() as folder:
        assert folder == home / "mine"
    assert os.environ[VARIABLE] == str(home / "mine")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(home, mode):
    folder = home / "caches" / "armed_pyro" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=rf"others may write to .*compiled \(mode {mode:o}"):
        private_cache().__enter__()
    assert VARIABLE not in os.environ


def test_a_folder_that_others_could_replace_is_refused(home):
    (home / "caches").mkdir()
    (home / "caches").chmod(0o777)
    with pytest.raises(PermissionError, match=r"others may write to .*caches \(mode 777"):
        private_cache().__enter__()
    (home / "caches").chmod(0o1777)  # sticky, as /tmp
    with private_cache():
        pass


def test_a_folder_of_someone_else_is_refused(home, monkeypatch):
    folder = home / "theirs"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(cache_folder.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="owner"):
        check_private(folder)


def test_a_link_is_judged_by_where_it_leads(home):
    (home / "open").mkdir()
    (home / "open").chmod(0o777)
    (home / "link").symlink_to(home / "open")
    with pytest.raises(PermissionError, match="open"):
        check_private(home / "link")


def test_compiling_stops_before_an_unsafe_cache_is_read(home, monkeypatch):
    folder = home / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv(VARIABLE, str(folder))
    inputs = [torch.ones(3)]
    with pytest.raises(PermissionError, match="could run code in this process"):
        compile_graph(capture(lambda x: (2 * x,), inputs), inputs)
    assert list(folder.iterdir()) == []
