"""Labelling functions of labels.yaml: what a package's name says of it. Each returns None where it cannot tell."""

import re


def name_of(text: str) -> str:
    return text.partition("\n")[0].removeprefix("Package: ").strip()


def role_of_name(text: str) -> str | None:
    name = name_of(text)
    for pattern, role in (
        (r"-dev$", "devel-lib"),
        (r"-doc$|-docs$|^doc-|-manual$|-howto", "documentation"),
        (r"-data$|-common$|^(fonts|ttf|xfonts|myspell|aspell|hunspell|w)-", "app-data"),
        (r"-plugins?$|-plugin-|-module$|^libapache2-mod|^xmms-|^gkrell", "plugin"),
        (r"^lib.*-(perl|java|ruby|ocaml|php)$|^(python|ruby|perl)\d?-", "devel-lib"),
        (r"^lib[a-z].*\d", "shared-lib"),
    ):
        if re.search(pattern, name):
            return role
    return None if name.startswith("lib") else "program"


def role_of_first_line(text: str) -> str | None:
    line = text.split("\n")[1].lower() if "\n" in text else ""
    for words, role in (
        (("development", "header", "bindings", "perl module", "python module", "perl interface"), "devel-lib"),
        (("documentation", "manual", "reference", "guide"), "documentation"),
        (("shared librar", "runtime librar", "(shared", "runtime"), "shared-lib"),
        (("plugin", "plug-in", "module for"), "plugin"),
        (("data", "dictionary", "theme", "font", "artwork"), "app-data"),
        (("game", "tool", "editor", "viewer", "client", "utility", "player", "program"), "program"),
    ):
        if any(word in line for word in words):
            return role
    return None


def language_of_name(text: str) -> list[str] | None:
    name = name_of(text)
    for pattern, language in (
        (r"^lib.*-perl$", "perl"),
        (r"^python\d?-|-python\d?$|^py", "python"),
        (r"-ocaml|^ocaml", "ocaml"),
        (r"-el$|^cl-|^elpa-|emacs", "lisp"),
        (r"\+\+", "c++"),
    ):
        if re.search(pattern, name):
            return [language]
    return None


def interface_of_name(text: str) -> list[str] | None:
    name = name_of(text)
    if re.search(r"-dev$|-doc$|-data$|^lib", name):
        return []
    if re.search(r"-server$|d$", name) and "daemon" in text.lower():
        return ["daemon"]
    return ["graphical", "x11"] if re.search(r"^(x|g|k|gnome-|kde-)[a-z]", name) and "GNOME" in text else None
