"""What a local Apache Kafka is made of: a Java that is new enough, and jars that Maven resolves from one pinned pom."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from streams.broker.process import BrokerError

MINIMUM_JAVA = 17
DEFAULT_CACHE = Path(".cache/kafka")
_OTHERWISE = 'or use another broker: "noida" (demo only), or the host:port of a Kafka that runs already'


@dataclass(frozen=True)
class Java:
    executable: str
    version: str


def find_java() -> Java:
    """Java of JAVA_HOME, else of PATH. Raises BrokerError when there is none or it is older than 17."""
    home = os.environ.get("JAVA_HOME")
    executable = shutil.which(str(Path(home, "bin", "java"))) if home else None
    executable = executable or shutil.which("java")
    if executable is None:
        raise BrokerError(
            f"no Java: Apache Kafka needs Java {MINIMUM_JAVA} or newer; install one "
            f"(Debian: apt install openjdk-17-jre-headless) and put it on PATH or in JAVA_HOME, {_OTHERWISE}"
        )
    # "17.0.15", "21" or, up to Java 8, "1.8.0_402"; with JAVA_TOOL_OPTIONS a line of notice comes first.
    answer = subprocess.run([executable, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "((?:1\.)?(\d+)[^"]*)"', answer.stderr + answer.stdout)
    if found is None:
        raise BrokerError(
            f"{executable} -version does not tell a version: {(answer.stderr or answer.stdout).strip()!r}"
        )
    if int(found[2]) < MINIMUM_JAVA:
        raise BrokerError(
            f"{executable} is Java {found[1]}, Apache Kafka needs {MINIMUM_JAVA} or newer; install one "
            f"(Debian: apt install openjdk-17-jre-headless) and put it on PATH or in JAVA_HOME, {_OTHERWISE}"
        )
    return Java(executable, found[1])


def pom() -> Path:
    """The pinned pom: beside this module in a wheel, in deploy/kafka in a checkout."""
    packaged = Path(__file__).with_name("pom.xml")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "deploy" / "kafka" / "pom.xml"


def kafka_version() -> str:
    """Version of Apache Kafka that the pom pins."""
    version = ET.parse(pom()).findtext("{*}properties/{*}kafka.version")
    assert version is not None, f"{pom()} has no property kafka.version"
    return version


def jars_directory(cache: Path = DEFAULT_CACHE) -> Path:
    """Where the jars of this very pom are, or will be."""
    digest = hashlib.sha256(pom().read_bytes()).hexdigest()[:12]
    return cache / f"{kafka_version()}-{digest}" / "libs"


def check(cache: Path = DEFAULT_CACHE) -> Java:
    """Java in force, given that the jars are here or can be fetched. Raises BrokerError that says what is missing."""
    java = find_java()
    if not jars_directory(cache).is_dir() and shutil.which("mvn") is None:
        raise BrokerError(
            f"no Maven (mvn), which fetches the jars of Apache Kafka {kafka_version()}; they are not in "
            f"{jars_directory(cache)} yet: install it (Debian: apt install maven), {_OTHERWISE}"
        )
    return java


def fetch_jars(cache: Path = DEFAULT_CACHE) -> Path:
    """The directory of the jars, filled by Maven the first time; safe when several processes do it at once.

    Raises BrokerError when Maven is missing or fails.
    """
    libs = jars_directory(cache)
    if libs.is_dir():
        return libs
    check(cache)
    libs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=libs.parent, prefix="fetching-") as aside:
        target = Path(aside).resolve() / "libs"
        command = ["mvn", "-q", "-B", "-f", str(pom()), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={target}"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0 or not (target / f"kafka_2.13-{kafka_version()}.jar").is_file():
            last = "\n".join(done.stdout.splitlines()[-15:])
            raise BrokerError(f"Maven could not fetch the jars of Apache Kafka {kafka_version()}:\n{last}")
        try:
            target.rename(libs)
        except OSError:
            if not libs.is_dir():  # else another process was faster, and its jars are the same
                raise
    return libs
