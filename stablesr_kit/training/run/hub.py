"""Upload of the results to the Hugging Face hub: the login is checked before training, the upload comes at the end."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from stablesr_kit.errors import ConfigError, OutputError
from stablesr_kit.training.run.config import RunConfig

LEFT_OUT = ("checkpoint-*", "diverged-*", "logs/wandb*", ".*")
"""Files that are not uploaded: checkpoints, which only this run resumes from, and files that are half written."""


def open_repository(config: RunConfig) -> str:
    """OWNER/NAME of the repository that the options name; it is created if it does not exist.

    Raises ConfigError where nobody is logged in, or the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        api.whoami()
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        return api.create_repo(name, private=config.hub_private, exist_ok=True).repo_id
    except LocalTokenNotFoundError as error:
        raise ConfigError(
            "push_to_hub needs a login to the Hugging Face hub; run `hf auth login`, set HF_TOKEN, or leave it out"
        ) from error
    except Exception as error:  # the client's own, and those of the libraries below it
        raise ConfigError(
            f"push_to_hub cannot make the repository at {api.endpoint}: {error}; "
            "check the connection, the login and hub_model_id, or leave push_to_hub out"
        ) from error


def upload(output_dir: Path, repository: str, message: str) -> str:
    """Upload the results, the model card and the records; the address of the commit.

    Raises OutputError where that fails: everything is still in output_dir.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=output_dir, commit_message=message, ignore_patterns=list(LEFT_OUT)
        )
    except Exception as error:  # likewise
        raise OutputError(
            f"{output_dir} is finished, but cannot be uploaded to {repository}: {error}; "
            f"upload it with `hf upload {repository} {output_dir}`"
        ) from error
    return str(commit.commit_url)
