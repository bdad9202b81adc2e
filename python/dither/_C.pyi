from typing import Any

hyperparameters: list[str]
rules: dict[str, int]

def build_info() -> dict[str, Any]: ...
def set_cpu_capability(name: str) -> None: ...
