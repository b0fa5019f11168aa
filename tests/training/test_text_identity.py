"""What makes two texts the same, and words of languages with and without spaces."""

from specserve.training.data.text_identity import shingles, similarity, text_key, words


def test_case_white_space_and_compatible_forms_make_no_difference():
    assert text_key("Straße \n ﬁne") == text_key("strasse fine") != text_key("strasse fin")


def test_words_of_scripts_without_spaces_are_their_letters():
    assert words("A package, 東京 2.5!") == ["a", "package", "東", "京", "2", "5"]


def test_similarity_counts_runs_of_letters():
    assert similarity(shingles("abcdef"), shingles("abcdef")) == 1
    assert similarity(shingles("abcdef"), shingles("abcdeg")) == 1 / 3
    assert similarity(shingles(""), shingles("abcdeg")) == 0
