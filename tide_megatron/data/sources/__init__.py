"""Where chats come from: files of JSON lines, Parquet and Arrow, folders and repositories of them.

A choice (`choice`) says where a source lies, how its rows become conversations (`shapes`) and which are left
out (`filters`); `opening` turns choices into sources that preparation reads, file by file.
"""
