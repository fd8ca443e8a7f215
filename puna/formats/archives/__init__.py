"""What torch.save wrote, read as data, and archives that torch.load opens.

torch_archive.py  tensors as views of the mapped file
torch_pickle.py   the pickle in it, read as data
zip_directory.py  where the members of a zip archive lie
torch_writer.py   an archive, streamed
"""
