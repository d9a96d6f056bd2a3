"""What a run leaves behind: one JSON record, figures, and a static page that shows them.

* :mod:`wellposed.report.record`: the record of a run, and where and with what it was made.
* :mod:`wellposed.report.styles`, :mod:`wellposed.report.plots`: one look for every plot; needs ``wellposed[plots]``.
* :mod:`wellposed.report.pictures`: pictures as bytes, and grids of images.
* :mod:`wellposed.report.page`: a page from sections, figures and tables, in one HTML file.
* :mod:`wellposed.report.run_page`: the page of one or several run folders.
"""
