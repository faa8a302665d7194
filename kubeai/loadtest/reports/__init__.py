"""How results are shown: alike by all commands, in the terminal and in files.

`compare` owns the rows of tables, `verdict` the sentences and main figures. `report` renders the
HTML page from them, with the plots of `charts` on the frame of `page`. `output` writes the files.
"""
