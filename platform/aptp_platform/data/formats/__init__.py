"""The formats that captioned images are read from; `data.captions.FORMATS` lists them."""
