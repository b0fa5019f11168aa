"""What the documentation's site has beyond docs/: the README as its first page, and files that pages link to.

Pages are written to be read in the repository, where links are relative paths. The site keeps them: a linked file is
copied under `files/`, and a linked folder, which has no page, becomes its name.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the README as index.md, and what is linked outside of docs/ under `files/`."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    pages = list(files.documentation_pages())
    seen = set()
    while pages:
        page = pages.pop()
        for link in _LINK.finditer(page.content_string):
            target = (_source_of(page.src_uri).parent / link[2]).resolve()
            site = _site_path(target)
            if target.is_file() and site.startswith("files/") and site not in seen:
                seen.add(site)
                files.append(file := File.generated(config, site, content=target.read_bytes()))
                if file.is_documentation_page():
                    pages.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    source, here = _source_of(page.file.src_uri), os.path.dirname(page.file.src_uri)

    def replaced(link: re.Match) -> str:
        target = (source.parent / link[2]).resolve()
        if target.is_dir():
            return link[1]
        return f"[{link[1]}]({os.path.relpath(_site_path(target), here or '.')}{link[3] or ''})"

    return _LINK.sub(replaced, markdown)


def _source_of(page: str) -> Path:
    """The file of the repository that a page of the site is."""
    if page == "index.md":
        return ROOT / "README.md"
    return ROOT / page.removeprefix("files/") if page.startswith("files/") else DOCS / page


def _site_path(target: Path) -> str:
    """Where the site has a file of the repository; what is no such file stays as it is, for mkdocs to complain of."""
    if target == ROOT / "README.md":
        return "index.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"files/{target.relative_to(ROOT).as_posix()}" if target.is_relative_to(ROOT) else target.as_posix()
