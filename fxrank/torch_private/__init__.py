"""What fxrank uses of torch that torch does not promise to keep: every private name is read here, in one place, by a small
function that says what it is needed for. Nothing is decided here, and each new torch is tried by the tests of this room.

May import: nothing.
Start reading: modules.py.
"""
