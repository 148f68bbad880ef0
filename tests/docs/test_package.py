"""The metadata of the package: what an index and a type checker read."""

import re
import sys
import tomllib

from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_licence_is_apache_2_with_its_text() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_classifiers_name_only_the_tested_python() -> None:
    versions = re.findall(r"Python :: (\d+\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert versions == [f"{sys.version_info.major}.{sys.version_info.minor}"]


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "esper" / "py.typed").exists()


def test_changelog_has_the_version_and_an_unreleased_section() -> None:
    headings = re.findall(r"^## \[(.+)\]$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[:2] == ["Unreleased", PROJECT["version"]]
