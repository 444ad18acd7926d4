"""One file per training method, by family.

A method file is what a reader opens beside the paper: citation and idea, a frozen configuration, and only what is
distinct. It imports no other method; what two share moves to the room that owns it. A method is found by its file and
the literal ``CARD`` in it: to add one, add the file, its tests and a page in docs/methods.

Traps: a variant without new mathematics is a recipe, not a class. Declare only the laws that hold with the defaults;
``difftilt check`` measures them.
"""
