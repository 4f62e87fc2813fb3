"""Upload a folder with its card to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, RepoCard

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    repo_type: str = "model",
    commit_message: str = "Upload with rgpt4d",
    api: HfApi | None = None,
) -> str:
    """Uploads every file of `folder` as one commit, to a repository that is made if need be.

    Args:
        folder (`str` or `Path`): holds what is published, with its card, README.md.
        repo_id (`str`): "user/name".
        private (`bool`, defaults to `True`): visibility of a new repository. An existing one keeps its own; to upload
            into a public one, say `private=False`.
        repo_type (`str`, defaults to `"model"`): or `"dataset"`, or `"space"` for a metric.
        commit_message (`str`): of the commit.
        api ([`~huggingface_hub.HfApi`], *optional*): with its endpoint and token; by default those of the environment.
    Returns: the commit's URL.
    Raises: `ValueError`, before any file is sent, if there is no card or it names no license, if the folder holds
        pickles (optimizer states, training arguments: publish an exported model, not a training folder) or nothing but
        the card, and if the repository is public although `private` was asked.
    """
    folder, api = Path(folder), api or HfApi()
    card_file = folder / "README.md"
    if not card_file.is_file():
        raise ValueError(f"{folder} has no card (README.md); write one with hub_cards.write_card")
    if not RepoCard.load(card_file, ignore_metadata_errors=True).data.get("license"):
        raise ValueError(f"{card_file} names no license; fill the card from the run's record")
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts
    )
    pickles = [str(path.relative_to(folder)) for path in files if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds pickles ({', '.join(pickles[:5])}); publish an exported model without checkpoints"
        )
    if files == [card_file]:
        raise ValueError(f"{folder} holds nothing but its card")
    space = {"space_sdk": "gradio"} if repo_type == "space" else {}
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **space)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"{repo_id} exists and is public; pass private=False to publish there")
    commit = api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type=repo_type, commit_message=commit_message)
    return commit.commit_url
