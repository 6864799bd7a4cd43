"""Compile ``attention.cpp`` for this machine, and keep the library where no other user can put theirs in its place.

A shared library runs as soon as it is loaded, so one is loaded only from a directory that is the user's own and that
nobody else may write in, and only if the file is the same. Inductor's cache directory comes first; by default it lies
in the directory for temporary files under a name that anyone can guess and make before us. Where it is not to be
trusted, the library goes to the user's cache directory, with a warning that says so.
"""

import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from icw_compile.compat.inductor import cache_dir, cpp_compiler
from icw_compile.errors import KernelUnavailableError

__all__ = ["begin_build", "build", "why_not_trusted"]

SOURCE = Path(__file__).with_name("attention.cpp")

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-maybe-uninitialized")
_FOLDER = "icw_int8kv"


def build() -> Path:
    """Compile the kernel for this machine, unless that has been done, and return the shared library.

    Safe against other processes that build the same: each compiles to a name of its own and moves it into place.

    Raises:
        KernelUnavailableError: no C++ compiler, a failed compilation, or no directory to keep the library in.
    """
    return begin_build().result()


def begin_build() -> Future[Path]:
    """The same, without waiting for the compiler: the result is there, or comes.

    Raises:
        KernelUnavailableError: no C++ compiler, or no directory to keep the library in. What the compilation fails of
            is raised where the result is taken.
    """
    compiler = _find_compiler()
    directory = _directory()
    library = directory / f"attention-{_fingerprint(compiler)}.so"
    if os.path.lexists(library):
        reason = why_not_trusted(library)
        if reason is None:
            there: Future[Path] = Future()
            there.set_result(library)
            return there
        warnings.warn(f"icw_int8kv: {reason}; it is built anew instead of loaded.", stacklevel=2)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=_FOLDER)  # which a process waits for when it ends
    building = thread.submit(_compile, compiler, directory, library)
    thread.shutdown(wait=False)
    return building


def _compile(compiler: str, directory: Path, library: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(suffix=".so", dir=directory)  # for its owner alone
        os.close(handle)
    except OSError as error:
        raise KernelUnavailableError(
            f"The CPU attention kernel cannot be stored in {directory}: {error}. "
            "Set TORCHINDUCTOR_CACHE_DIR to a directory that can be written."
        ) from error
    built = Path(name)
    try:
        command = _command(compiler, built)
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise KernelUnavailableError(
                f"The CPU attention kernel does not compile with {compiler!r}.\n"
                f"{shlex.join(command)}\n{process.stderr[:4000]}"
            )
        built.chmod(0o700)  # a linker makes a file as the umask says
        built.replace(library)
    except OSError as error:
        raise KernelUnavailableError(f"The CPU attention kernel cannot be built: {error}") from error
    finally:
        built.unlink(missing_ok=True)
    return library


def _directory() -> Path:
    """The first directory that can be made and is to be trusted, without symbolic links in its path.

    Raises:
        KernelUnavailableError: there is none.
    """
    reasons: list[str] = []
    for make in (cache_dir, _user_cache_dir):
        try:
            directory = make() / _FOLDER
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = directory.resolve(strict=True)
            reason = why_not_trusted(directory)
        except (OSError, RuntimeError) as error:
            reason = str(error)
        if reason is None:
            if reasons:
                warnings.warn(
                    f"icw_int8kv: {reasons[0]}; the CPU attention kernel is kept in {directory}. Set "
                    "TORCHINDUCTOR_CACHE_DIR to a directory of your own to keep it there.",
                    stacklevel=2,
                )
            return directory
        reasons.append(reason)
    raise KernelUnavailableError(
        f"There is no safe place to keep the CPU attention kernel: {'; '.join(reasons)}. "
        "Set TORCHINDUCTOR_CACHE_DIR to a directory that is yours and that nobody else may write in."
    )


def _user_cache_dir() -> Path:
    """``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def why_not_trusted(path: Path) -> str | None:
    """Why another user could have made this file or directory what it is, or ``None``.

    It has to be the user's own, not a symbolic link, and writable by nobody else; each directory above it has to be the
    user's or the system's, and writable by nobody else but where the sticky bit keeps others from renaming what they do
    not own, as in ``/tmp``.

    Args:
        path: absolute, no symbolic link among the directories above it.

    Raises:
        OSError: it cannot be looked at.
    """
    user = os.geteuid()
    # Who owns the root of the file system can replace whatever lies under it.
    system = {0, os.lstat(path.anchor).st_uid}
    for place in (path, *path.parents):
        status = os.lstat(place)
        if stat.S_ISLNK(status.st_mode):
            return f"{place} is a symbolic link"
        if status.st_uid != user and (place == path or status.st_uid not in system):
            return f"{place} belongs to another user"
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if writable and (place == path or not status.st_mode & stat.S_ISVTX):
            return f"{place} can be written by other users"
    return None


def _find_compiler() -> str:
    """The compiler that Inductor would use for this process's generated code (``CXX``, or g++ or clang++)."""
    if platform.system() == "Windows":
        raise KernelUnavailableError("The CPU attention kernel is not built on Windows.")
    try:
        compiler = cpp_compiler()
        subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise KernelUnavailableError(
            f"No working C++ compiler for the CPU attention kernel ({error}). Install g++, or set CXX."
        ) from error
    return compiler


def _command(compiler: str, output: Path) -> list[str]:
    torch_dir = Path(torch.__file__).parent
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    if platform.machine() == "x86_64":
        # Compilers prefer 256 bits, for the sake of code that only now and then has a vector.
        native.append("-mprefer-vector-width=512")
    # Apple's clang has no OpenMP of its own: one thread there.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    # Some compilers link an archive of their C++ library: its symbols are not to mix with those of torch's.
    hidden = ["-Wl,--exclude-libs,ALL"]
    link = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else [*hidden, "-ltorch_cpu"]
    return [
        *shlex.split(compiler),
        *_FLAGS,
        *native,
        *openmp,
        f"-I{torch_dir / 'include'}",
        str(SOURCE),
        "-o",
        str(output),
        f"-L{torch_dir / 'lib'}",
        *link,
    ]


def _fingerprint(compiler: str) -> str:
    """Hash of all that the library depends on: source, command, compiler, torch, and the CPU that "native" means."""
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=False).stdout
    parts = [
        SOURCE.read_bytes(),
        "\n".join(_command(compiler, Path("out"))).encode(),
        version,
        torch.__version__.encode(),
        _cpu_description().encode(),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _cpu_description() -> str:
    lines = []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name = line.split(":")[0].strip()
            if name in ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part"):
                lines.append(line)
            elif not name:  # The first processor stands for all.
                break
    except OSError:
        pass
    return "\n".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *lines])
