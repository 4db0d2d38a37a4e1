"""A run's model on the Hugging Face hub: the folder for diffusers, a full card, pictures."""

from pathlib import Path

from fedray.errors import RunError, UserError, reason
from fedray.record.card import PICTURES, model_card
from fedray.record.run import Run


def check_repository(name: str) -> None:
    """Raise `UserError` unless the hub takes a repository of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--hub-model-id {name}: {reason(error)}.") from None


def push(
    run: Run, repository: str, *, license: str | None = None, token: str | None = None, private: bool = False
) -> str:
    """Upload a complete run's model in one commit, and return the address of its page.

    Args:
        repository: as USER/NAME, or NAME of the token's user; it is made if it is not there.
        license: as the hub names it.
        token: one that may write; by default that of `hf auth login`, or $HF_TOKEN.

    Raises:
        UserError: the run is not complete, has links among its files, or no repository can have that name.
        RunError: the hub refused, or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    result = run.result
    if result is None:
        raise UserError(f"the run at {run} is not complete, and has no model yet; resume it.")
    pictures = {name: run.directory / name for name in PICTURES if (run.directory / name).is_file()}
    card = model_card(run.saved["config"], result, run.saved.get("command", []), license, list(pictures))
    folder = run.directory / "model"
    within = [folder, *sorted(folder.rglob("*")), *pictures.values()]
    if links := [path for path in within if path.is_symlink()]:
        raise UserError(f"{links[0]} is a link, and what it leads to is not pushed; put a file or folder in its place.")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    contents: dict[str, Path | bytes] = {str(path.relative_to(folder)): path for path in files}
    contents |= {**pictures, "README.md": card.encode()}
    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=f"A model of fedray, after {result['rounds']} rounds",
        )
    except Exception as error:  # also those of its HTTP library, which is another in each version
        raise RunError(f"{repository} could not be pushed to the hub: {reason(error)}; the run is kept.") from error
    return str(made)
