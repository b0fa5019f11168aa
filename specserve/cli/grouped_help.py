"""`specserve --help`: the commands by what they are for, each with its whole first sentence.

Every command stands in one section of `SECTIONS`; a test holds that.
"""

import click

SECTIONS = {
    "Serve and ask": ("serve", "ray", "chat", "generate", "batch"),
    "Make rows to train on": ("prompts", "distill", "synthesize", "label"),
    "Train and compare": ("train", "eval", "refit", "sweep", "curve", "leaderboard"),
    "Look after": ("doctor", "pull", "adapters", "store", "teacher-cache", "route", "keys", "bench", "completion"),
}
_LONGEST = 300  # of a summary in characters, past which click cuts


class GroupedCommands(click.Group):
    """A group whose help lists its commands by `SECTIONS`."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                summaries = (self.commands[name].get_short_help_str(_LONGEST) for name in names)
                formatter.write_dl([(name.ljust(width), text) for name, text in zip(names, summaries, strict=True)])
