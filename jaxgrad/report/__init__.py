"""What people look at: a table in the terminal and a page that opens anywhere.

`record` says what a report is made of, `terminal` makes the table, `figures` the pictures (the one
file that imports matplotlib) and `html` the page. Nothing here prints.
"""
