"""Upload an export to the Hugging Face Hub, where a config asks for it."""

from pathlib import Path

from flowmatch.config import UserError
from flowmatch.runs import storage

KEPT_BACK = [".lock", ".scratch/*", "config.yaml"]  # config.yaml has local paths


def check_push(name: str) -> None:
    """Check that an upload can succeed: the name, the network and the token; in a dry run the name.

    Args:
        name: ORG/NAME.

    Raises:
        UserError: It cannot.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    where = f"push_to_hub={name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    if name.count("/") != 1:
        raise UserError(f"{where}: expected ORG/NAME")
    if storage.is_unplugged():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    try:
        HfApi().whoami()
    except (OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: the hub gives no account: {told}; log in with `hf auth login` or set HF_TOKEN"
        ) from None


def push(folder: Path, name: str) -> str:
    """Upload a sealed export, and make the repository where there is none.

    Returns:
        Its address.

    Raises:
        UserError: The upload failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=KEPT_BACK,
            commit_message="Upload an export of flowmatch",
        )
    except (OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"push_to_hub={name}: the upload failed: {told}; repeat the command"
        ) from None
    return str(address)
