"""Duration of loading settings: PyYAML's C loader against its Python loader, each shipped file, one section.

Medians of interleaved rounds of one run, in milliseconds. Loading reads all sources: the file, the environment, and
the file of a running stack if there is one.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from esper.config import SECTIONS, get_service_config, load_settings
from esper.config.settings_reference import check_all, configured_sections
from esper.config.yaml_file import LOADER, read_yaml

CONFIGS = Path(__file__).parents[3] / "configs"
ADDRESSES = {
    "ESPER_KAFKA__BOOTSTRAP_SERVERS": "a:9092,b:9092,c:9092",
    "ESPER_KAFKA__SECURITY__PASSWORD": "a-long-password",
    "ESPER_POSTGRES__DSN": "postgresql://esper:another-password@db:5432/esper",
    "ESPER_S3__ACCESS_KEY": "an-access-key",
    "ESPER_S3__SECRET_KEY": "a/secret+key",
}
ROUNDS = 40


def medians_ms(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _round in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(t) for name, t in taken.items()}


def show(title: str, works: dict[str, Callable[[], object]]) -> None:
    figures = medians_ms(works)
    base = next(iter(figures.values()))
    print(f"{title:52}{'ms':>10}{'ratio':>10}")
    for name, ms in figures.items():
        print(f"  {name:50}{ms:10.3f}{ms / base:10.2f}")


def main() -> None:
    environment = {**os.environ, **ADDRESSES}
    files = sorted(CONFIGS.glob("*.yaml"))
    production = CONFIGS / "production.yaml"
    text = production.read_text()
    for name in SECTIONS:  # import the modules of the models once
        get_service_config(name, load_settings(production, environment))
    show(
        f"production.yaml ({len(text.splitlines())} lines), read",
        {
            f"with lines and checks, {LOADER.__name__}": lambda: read_yaml(production),
            "with lines and checks, SafeLoader": lambda: read_yaml(production, yaml.SafeLoader),
            "yaml.load alone, CSafeLoader": lambda: yaml.load(text, Loader=yaml.CSafeLoader),
            "yaml.load alone, SafeLoader": lambda: yaml.safe_load(text),
        },
    )
    show(
        "load_settings, and every section checked",
        {path.name: lambda p=path: check_all(load_settings(p, environment)) for path in files},
    )
    settings = load_settings(production, environment)
    show(
        "one section",
        {f"get_service_config({name!r})": lambda n=name: get_service_config(n, settings) for name in configured_sections(settings)},
    )  # fmt: skip
    os.environ.update(ADDRESSES, ESPER_CONFIG=str(production))
    show(
        "one section, reading all sources again", {"get_service_config('tamiyo')": lambda: get_service_config("tamiyo")}
    )


if __name__ == "__main__":
    main()
