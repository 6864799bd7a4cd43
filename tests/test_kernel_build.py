"""Where the CPU kernel's library is kept, who may have put it there, and what a failure to build it costs."""

import os
import stat
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from icw_compile.compat.inductor import cpp_compiler
from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels import build as module
from icw_compile.kernels import cpu
from icw_compile.kernels.build import build, why_not_trusted

if not cpu.is_available():
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Inductor's cache directory and the user's, both new; the compiler writes a small file in no time."""
    inductor, home = tmp_path / "inductor", tmp_path / "home"
    inductor.mkdir(mode=0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    run = subprocess.run
    built = []

    def compile_nothing(command, **kwargs):
        if "-o" not in command:
            return run(command, **kwargs)
        output = Path(command[command.index("-o") + 1])
        output.write_bytes(b"a library")
        built.append(output)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    return inductor, home, built


def test_a_good_library_is_used_again(places):
    inductor, _, built = places
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = build(), build()
    assert first == second and first.parent == (inductor / "icw_int8kv").resolve()
    assert len(built) == 1
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("which", ["ours", "inductor's"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_directory_that_others_may_write_in(places, which, mode):
    inductor, home, _ = places
    (inductor / "icw_int8kv").mkdir()
    bad = inductor / "icw_int8kv" if which == "ours" else inductor
    bad.chmod(mode)
    with pytest.warns(UserWarning, match=f"{bad.name} can be written by other users.*is kept in {home}"):
        library = build()
    assert library.parent == (home / "icw_int8kv").resolve()
    assert not list((inductor / "icw_int8kv").iterdir())


def test_a_sticky_directory_above_is_as_good_as_any(places):
    inductor, _, _ = places
    inductor.chmod(0o1777)  # as /tmp
    assert build().parent.parent == inductor.resolve()
    (inductor / "icw_int8kv").chmod(0o1777)  # but not that of the library itself
    assert why_not_trusted(inductor / "icw_int8kv").endswith("can be written by other users")


def test_another_users_directory(places, monkeypatch):
    """As root sees it, all of it is root's; as anybody else, what root left there is not theirs."""
    first = build()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in why_not_trusted(first)
    with pytest.raises(KernelUnavailableError, match="no safe place") as caught:
        build()
    assert "inductor/icw_int8kv belongs to another user" in str(caught.value)
    assert "home/icw_int8kv belongs to another user" in str(caught.value)
    assert "TORCHINDUCTOR_CACHE_DIR" in str(caught.value)


def test_another_users_file_or_parent(places, monkeypatch):
    first = build()
    lstat = os.lstat

    def owned_by_another(name):
        def look(path, **kwargs):
            result = lstat(path, **kwargs)
            if Path(path).name != name:
                return result
            return os.stat_result([*result[:4], 12345, *result[5:]])

        return look

    for name in (first.name, "icw_int8kv", "inductor"):
        monkeypatch.setattr(os, "lstat", owned_by_another(name))
        assert why_not_trusted(first) == f"{next(p for p in (first, *first.parents) if p.name == name)} belongs to " + (
            "another user"
        )
    monkeypatch.setattr(os, "lstat", owned_by_another("inductor"))
    with pytest.warns(UserWarning, match="inductor belongs to another user"):
        assert build().parent.parent.name == "home"


def test_symbolic_links(places, tmp_path):
    inductor, home, _ = places
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A link to a directory that others may write in is that directory.
    (inductor / "icw_int8kv").symlink_to(elsewhere)
    elsewhere.chmod(0o777)
    with pytest.warns(UserWarning, match="elsewhere can be written by other users"):
        library = build()
    assert library.parent.parent == home.resolve()
    # A library that is a link is built anew, and what it points at is left alone.
    theirs = tmp_path / "theirs.so"
    theirs.write_bytes(b"theirs")
    library.unlink()
    library.symlink_to(theirs)
    elsewhere.chmod(0o700)
    (inductor / "icw_int8kv").unlink()
    (inductor / "icw_int8kv").mkdir(0o700)
    library = inductor.resolve() / "icw_int8kv" / library.name
    library.symlink_to(theirs)
    with pytest.warns(UserWarning, match="is a symbolic link; it is built anew"):
        assert build() == library
    assert not library.is_symlink() and library.read_bytes() == b"a library"
    assert theirs.read_bytes() == b"theirs"
    # So is one that points nowhere.
    library.unlink()
    library.symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="is a symbolic link"):
        assert build() == library


@pytest.mark.parametrize("mode", [0o666, 0o775])
def test_a_library_that_others_may_write(places, mode):
    library = build()
    library.write_bytes(b"theirs")
    library.chmod(mode)
    with pytest.warns(UserWarning, match="can be written by other users; it is built anew"):
        assert build() == library
    assert library.read_bytes() == b"a library"
    assert stat.S_IMODE(library.stat().st_mode) == 0o700


def test_no_place_at_all(places, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "a"))
    with pytest.warns(UserWarning, match="file.*is kept in"):
        assert build().parent.parent.name == "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "b"))
    with pytest.raises(KernelUnavailableError, match="no safe place"):
        build()


def test_a_failure_is_not_forever(monkeypatch):
    """It is repeated for a while, without another try, and then tried again: a disk is not full forever."""
    tried = []

    def full():
        tried.append(1)
        raise KernelUnavailableError("no space left on device")

    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    monkeypatch.setattr(cpu, "build", full)
    for _ in range(3):
        with pytest.raises(KernelUnavailableError, match="no space left"):
            cpu.load()
    assert len(tried) == 1 and not cpu.is_available()
    monkeypatch.setattr(cpu, "_RETRY_SECONDS", 0.0)
    with pytest.raises(KernelUnavailableError, match="no space left"):
        cpu.load()
    assert len(tried) == 2
    loaded = []
    monkeypatch.setattr(cpu, "build", lambda: Path("some.so"))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    cpu.load()
    cpu.load()
    assert loaded == ["some.so"] and cpu.is_available()


def test_a_build_that_was_begun_is_waited_for(monkeypatch):
    building, loaded = Future(), []
    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    monkeypatch.setattr(cpu, "begin_build", lambda: building)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert cpu.begin() and cpu.begin()
    threading.Timer(0.05, building.set_result, [Path("some.so")]).start()
    cpu.load()
    assert loaded == ["some.so"] and not cpu.begin()


def test_a_library_that_is_there_needs_no_wait(monkeypatch):
    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    there = Future()
    there.set_result(Path("some.so"))
    monkeypatch.setattr(cpu, "begin_build", lambda: there)
    assert not cpu.begin()


def test_what_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    monkeypatch.setattr(cpu, "build", lambda: tmp_path / "broken.so")
    with pytest.raises(KernelUnavailableError, match="built but does not load"):
        cpu.load()


LOAD = "import sys; from icw_compile.kernels import cpu; print(cpu.is_available())\n" + (
    "try: cpu.load()\nexcept RuntimeError as error: print(error)\n"
)


def run_loader(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", LOAD]
    return subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_build_at_once(monkeypatch, tmp_path):
    processes = [run_loader(monkeypatch, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    # Other packages, which transformers imports, may say something first.
    assert [process.communicate()[0].split()[-1] for process in processes] == ["True", "True"]
    assert len(list((tmp_path / "icw_int8kv").iterdir())) == 1


WRONG = """
import torch
from icw_compile.kernels import cpu
cpu.load()
try: torch.ops.icw_int8kv.quantize_divided(torch.ones(3, 2, 4), torch.ones(2, 1, 4, dtype=torch.uint8), True)
except RuntimeError as error: print(error)
"""


def test_a_compiler_that_links_an_archive_of_its_library(tmp_path):
    """What is wrong is said all the same: numbers in a message take more of the C++ library than anything else."""
    found = subprocess.run(
        [cpp_compiler(), "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=False
    )
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no such archive")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {cpp_compiler()} -static-libstdc++ "$@"\n')
    compiler.chmod(0o700)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": str(compiler)}
    process = subprocess.run(
        [sys.executable, "-c", WRONG], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "dimension 0 of shift is 2 and not 3" in process.stdout


@pytest.mark.parametrize("compiler", [pytest.param("/nowhere/g++", marks=pytest.mark.slow), "/bin/false"])
def test_no_compiler(monkeypatch, tmp_path, compiler):
    process = run_loader(monkeypatch, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX=compiler)
    output = process.communicate()[0]
    assert "False" in output
    assert "compiler" in output
    assert module.SOURCE.name not in output  # nothing was compiled
