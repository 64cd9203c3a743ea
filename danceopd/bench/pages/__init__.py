"""Pages and pictures to publish beside the report: a contact sheet, two benches side by side, a blind vote of people.

In: finished benches and nothing else. Out: contact.png, compare.html, blind.html, each one file without a request to
the network. Read contact.py first.
"""
