"""`danceopd ui RUN`: a page in the browser on which a run is looked at and its student is tried.

`studio.py` draws with the student, its teachers and its base on one loaded pipeline and knows no page; `page.py` is the
page (Gradio, an extra); `command.py` starts it. Read `studio.py` first.
"""
