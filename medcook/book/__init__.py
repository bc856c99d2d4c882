"""The book as a web site: everything that Sphinx reads is written from the repository as it is, nothing by hand.

`make book` writes the sources into build/book/source (`write_sources`), lets Sphinx turn them into build/book/html, and
checks the result (`medcook.book.checks`): links, images, and that nothing is loaded from elsewhere. Notebooks are shown
as they were executed and committed; none is run.
"""
