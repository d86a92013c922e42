"""Uploads a saved model to the Hugging Face hub."""

from pathlib import Path

from sweet_jax.errors import UserError, one_line


def upload_model(folder: Path, name: str, *, private: bool) -> str:
    """Creates the repository `name` if needed, uploads a folder to it, and returns its URL.

    Raises UserError if the upload fails.
    """
    import huggingface_hub  # slow to import, and not needed for local files

    try:
        huggingface_hub.create_repo(name, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the client raises many types; to a user they mean the same
        message = f"could not push {str(folder)!r} to {name!r}: {one_line(error)}"
        raise UserError(message) from error
