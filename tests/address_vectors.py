"""Addresses and URLs that a fetcher must refuse or allow. Plain data, shared by several tests.

FORBIDDEN_ADDRESSES and ALLOWED_ADDRESSES: results of a name's resolution, or literals in a URL. REFUSED_URLS: (url, a
word of the reason), for a policy without private hosts. ALLOWED_URLS: (url, expected host). MIXED_ANSWERS: DNS answers
with one forbidden address, which makes the whole answer forbidden.
"""

FORBIDDEN_ADDRESSES = """
0.0.0.0 0.0.0.1 0.255.255.255
10.0.0.0 10.0.0.1 10.255.255.255
100.64.0.0 100.100.100.200 100.127.255.255
127.0.0.1 127.0.0.2 127.1.2.3 127.255.255.255
168.63.129.16
169.254.0.1 169.254.169.254 169.254.170.2 169.254.170.23 169.254.42.42 169.254.255.255
172.16.0.0 172.17.0.1 172.31.255.255
192.0.0.0 192.0.0.8 192.0.0.9 192.0.0.10 192.0.0.170 192.0.0.192
192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.88.99.2
192.168.0.1 192.168.255.255 192.175.48.1
198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.255
224.0.0.1 224.0.0.251 232.1.2.3 239.255.255.250
240.0.0.1 250.1.2.3 255.255.255.254 255.255.255.255
:: ::1 ::2 ::ffff
::127.0.0.1 ::10.0.0.1 ::8.8.8.8 ::a9fe:a9fe
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:8.8.8.8 ::ffff:0:0 ::ffff:a9fe:a9fe
::ffff:0:127.0.0.1 ::ffff:0:10.0.0.1 ::ffff:0:a9fe:a9fe ::ffff:0:8.8.8.8
64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b::168.63.129.16
64:ff9b::8.8.8.8%eth0 64:ff9b::1:808:808
64:ff9b:1::127.0.0.1 64:ff9b:1:a9fe:a9:fe00:: 64:ff9b:1:7f00:0:100:: 64:ff9b:1:ffff::1
100::1 100:0:0:1::1 200::1 400::1 1000::1
2001::1 2001:0:4136:e378:8000:63bf:80ff:fffe 2001:0:1:2:3:4:f5ff:fffe
2001:1::1 2001:1::2 2001:1::3 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff::1
2001:db8::1 2001:db8:ffff::1
2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe:: 2002:808:808::1
2600:1f18::5efe:127.0.0.1 2600:1f18::5efe:169.254.169.254 2600:1f18::200:5efe:10.0.0.1 2a00:1450::5efe:c0a8:1
2620:4f:8000::1
3ffe::1 3fff::1 3fff:fff::1
4000::1 5f00::1 6000::1 8000::1 a000::1 c000::1 e000::1 f000::1 f800::1
fc00::1 fd00::1 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:42::42 fd00:c1::a9fe:a9fe fdff:ffff::1
fe80::1 fe80::1%eth0 fe80::a9fe:a9fe fea0::1 febf::1
fec0::1 feff::1
ff00::1 ff02::1 ff02::fb ff05::2 ff0e::1 ffff::1
2600:1f18::1%eth0
""".split()  # noqa: SIM905 - one row per block reads better than a list of 170 lines

ALLOWED_ADDRESSES = """
1.0.0.1 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 52.216.0.1 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.1 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0
192.0.3.1 192.88.98.1 192.88.100.1 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.1 198.51.101.1
203.0.112.1 203.0.114.1 223.255.255.255
2001:200::1 2001:470::1 2001:4860:4860::8888 2001:db7::1 2001:db9::1 2003::1 2400:cb00::1 2600:1f18::1
2606:4700:4700::1111 2620:fe::fe 2620:4f:7fff::1 2620:4f:8001::1 2800::1 2a00:1450:4001::1 2c0f:f248::1
2600:1f18::5efe:808:808 2600:1f18:0:0:200:5efe:808:808
64:ff9b::8.8.8.8 64:ff9b::34d8:1
""".split()  # noqa: SIM905 - one row per block reads better than a list of 170 lines

_LITERALS = tuple(
    (f"https://[{text}]/a.png" if ":" in text else f"https://{text}/a.png", "percent" if "%" in text else "dialled")
    for text in FORBIDDEN_ADDRESSES
)

REFUSED_URLS = (
    # schemes
    ("http://cdn.example.com/a.png", "not https"),
    ("http://8.8.8.8/a.png", "not https"),
    ("ftp://cdn.example.com/a.png", "scheme"),
    ("file:///etc/passwd", "scheme"),
    ("gopher://127.0.0.1:6379/_FLUSHALL", "scheme"),
    ("javascript://cdn.example.com/%0aalert(1)", "scheme"),
    ("data:image/png;base64,iVBORw0KGgo=", "absolute"),
    ("blob:https://cdn.example.com/1", "absolute"),
    ("https+unix://cdn.example.com/", "scheme"),
    ("jar:https://cdn.example.com!/", "absolute"),
    ("view-source:https://cdn.example.com/", "absolute"),
    ("", "absolute"),
    ("/a.png", "absolute"),
    ("//cdn.example.com/a.png", "absolute"),
    ("cdn.example.com/a.png", "absolute"),
    ("https:cdn.example.com/a.png", "absolute"),
    ("https:/cdn.example.com/a.png", "absolute"),
    ("https:///cdn.example.com/a.png", "domain name"),
    ("https://", "domain name"),
    ("https://?a=b", "domain name"),
    ("https://#a", "domain name"),
    ("://cdn.example.com/", "absolute"),
    # characters
    ("https://cdn.example.com /a.png", "domain name"),
    ("https://cdn example.com/a.png", "domain name"),
    ("ht tps://cdn.example.com/a.png", "absolute"),
    ("https://cdn.example.com\u3000/a.png", "international"),
    ("https://cdn.example.com/\r\nHost: evil", "control"),
    ("https://cdn.example.com/\x00", "control"),
    ("https://cdn.exa\tmple.com/", "control"),
    ("ht\ntps://cdn.example.com/", "control"),
    ("https://cdn.example.com/\x7f", "control"),
    ("https:\\\\cdn.example.com\\a.png", "backslash"),
    ("https://cdn.example.com\\@127.0.0.1/", "backslash"),
    ("https://127.0.0.1\\.cdn.example.com/", "backslash"),
    ("https://cdn.example.com/\ud800", "surrogate"),
    ("https://cdn.\ud800example.com/", "international"),
    ("https://cdn.example.com/" + "a" * 8_192, "longer"),
    # user information
    ("https://user@cdn.example.com/", "user information"),
    ("https://user:secret@cdn.example.com/", "user information"),
    ("https://@cdn.example.com/", "user information"),
    ("https://cdn.example.com@127.0.0.1/", "user information"),
    ("https://cdn.example.com:443@127.0.0.1/", "user information"),
    ("https://cdn.example.com%40127.0.0.1/", "percent"),
    ("https://a@b@127.0.0.1/", "user information"),
    # ports
    ("https://cdn.example.com:80/", "port"),
    ("https://cdn.example.com:22/", "port"),
    ("https://cdn.example.com:8443/", "port"),
    ("https://cdn.example.com:0/", "port"),
    ("https://cdn.example.com:65536/", "port"),
    ("https://cdn.example.com:99999/", "port"),
    ("https://cdn.example.com:443443/", "malformed"),
    ("https://cdn.example.com:+443/", "malformed"),
    ("https://cdn.example.com:-1/", "malformed"),
    ("https://cdn.example.com:0x1bb/", "malformed"),
    ("https://cdn.example.com:４４３/", "malformed"),
    ("https://cdn.example.com:443:443/", "malformed"),
    ("https://127.0.0.1:443:80/", "malformed"),
    # spellings of IPv4
    ("https://2130706433/", "unusual"),
    ("https://0x7f000001/", "unusual"),
    ("https://0x7f.0.0.1/", "unusual"),
    ("https://0x7F.1/", "unusual"),
    ("https://017700000001/", "unusual"),
    ("https://0177.0.0.1/", "unusual"),
    ("https://127.1/", "unusual"),
    ("https://127.0.1/", "unusual"),
    ("https://127.0.0.01/", "unusual"),
    ("https://127.0.0.1./", "loopback"),
    ("https://127.0.0.1../", "domain name"),
    ("https://127.0.0.0x1/", "unusual"),
    ("https://127.0.0.1.0/", "unusual"),
    ("https://0/", "unusual"),
    ("https://0x/", "unusual"),
    ("https://256.256.256.256/", "unusual"),
    ("https://0251.0376.0251.0376/", "unusual"),
    ("https://2852039166/", "unusual"),
    ("https://0xa9fea9fe/", "unusual"),
    ("https://8.8.2056/", "unusual"),
    ("https://a.127.0.0.1.0x1/", "unusual"),
    ("https://１２７.０.０.１/", "loopback"),
    ("https://127。0。0。1/", "loopback"),
    ("https://①②⑦.⓪.⓪.①/", "loopback"),
    ("https://１６９.２５４.１６９.２５４/", "metadata"),
    ("https://%31%32%37.0.0.1/", "percent"),
    ("https://127.0.0.1%2f.cdn.example.com/", "percent"),
    # spellings of IPv6
    ("https://[::1%25eth0]/", "percent"),
    ("https://[fe80::1%eth0]/", "percent"),
    ("https://[::ffff:7f00:1]/", "IPv4-mapped"),
    ("https://[0:0:0:0:0:ffff:127.0.0.1]/", "IPv4-mapped"),
    ("https://[0000:0000:0000:0000:0000:0000:0000:0001]/", "loopback"),
    ("https://[::127.0.0.1]/", "IPv4-compatible"),
    ("https://[::1/", "malformed"),
    ("https://::1/", "malformed"),
    ("https://[::1]a/", "malformed"),
    ("https://[::1].cdn.example.com/", "malformed"),
    ("https://[127.0.0.1]/", "not an IPv6"),
    ("https://[v1.fe80]/", "not an IPv6"),
    ("https://[]/", "not an IPv6"),
    ("https://[::g]/", "not an IPv6"),
    # names
    ("https://localhost/", "private name"),
    ("https://LOCALHOST/", "private name"),
    ("https://localhost./", "private name"),
    ("https://ｌｏｃａｌｈｏｓｔ/", "private name"),
    ("https://a.localhost/", "private name"),
    ("https://printer.local/", "private name"),
    ("https://metadata.google.internal/", "private name"),
    ("https://instance-data.ec2.internal/", "private name"),
    ("https://nas.home.arpa/", "private name"),
    ("https://expyuzz4wqqyqhjn.onion/", "private name"),
    ("https://metadata/", "without a domain"),
    ("https://kubernetes/", "without a domain"),
    ("https://./", "domain name"),
    ("https://.cdn.example.com/", "domain name"),
    ("https://cdn..example.com/", "domain name"),
    ("https://cdn.example.com../", "domain name"),
    ("https://" + "a" * 64 + ".example.com/", "domain name"),
    ("https://" + "a." * 127 + "com/", "domain name"),
    ("https://cdn.example.com;evil.com/", "domain name"),
    ("https://cdn.example.com,evil.com/", "domain name"),
    ("https://cdn.example.com&evil.com/", "domain name"),
    ("https://cdn<script>.example.com/", "domain name"),
    ("https://cdn^example.com/", "domain name"),
    ("https://cdn|example.com/", "domain name"),
    ("https://$(id).example.com/", "domain name"),
    ("https://*.example.com/", "domain name"),
    ("https://xn--zz--.\u2488com/", "international"),
    *_LITERALS,
)

ALLOWED_URLS = (
    ("https://cdn.example.com/a.png", "cdn.example.com"),
    ("https://cdn.example.com", "cdn.example.com"),
    ("https://cdn.example.com?a=b", "cdn.example.com"),
    ("https://cdn.example.com/a.png#fragment", "cdn.example.com"),
    ("HTTPS://CDN.Example.COM/A.png", "cdn.example.com"),
    ("https://cdn.example.com:443/a.png", "cdn.example.com"),
    ("https://cdn.example.com:/a.png", "cdn.example.com"),
    ("https://cdn.example.com:00443/a.png", "cdn.example.com"),
    ("https://cdn.example.com./a.png", "cdn.example.com"),
    ("https://h1.inkwai.com/bs2/a.png?x-oss-process=image", "h1.inkwai.com"),
    ("https://p2-fdl.klingai.com/ksc2/a.png?cacheKey=1&x-kcdn-pid=2&pkey=a%2Fb~_-", "p2-fdl.klingai.com"),
    ("https://s15-kling-fdl.klingai.com/a?Expires=1&Signature=a~b_-&Key-Pair-Id=K", "s15-kling-fdl.klingai.com"),
    ("https://my_bucket.s3.amazonaws.com/a.png", "my_bucket.s3.amazonaws.com"),
    ("https://cdn.example.com/a/../b//c;d=e,f/g.png", "cdn.example.com"),
    ("https://cdn.example.com/a@b:c.png", "cdn.example.com"),
    ("https://cdn.example.com/?next=http://127.0.0.1/", "cdn.example.com"),
    ("https://cdn.example.com/%00%2e%2e", "cdn.example.com"),
    (" https://cdn.example.com/a.png", "cdn.example.com"),
    ("\r\n\thttps://cdn.example.com/a.png \n", "cdn.example.com"),
    ("https://cdn.example.com/my image.png?a=b c", "cdn.example.com"),
    ("https://cdn.example.com/图.png", "cdn.example.com"),
    ("https://bücher.example/a.png", "xn--bcher-kva.example"),
    ("https://例え.jp/a.png", "xn--r8jz45g.jp"),
    ("https://ｃｄｎ.ｅｘａｍｐｌｅ.com/a.png", "cdn.example.com"),
    ("https://cdn。example。com/a.png", "cdn.example.com"),
    ("https://xn--bcher-kva.example/a.png", "xn--bcher-kva.example"),
    ("https://127.0.0.1.example.com/a.png", "127.0.0.1.example.com"),
    ("https://localhost.example.com/a.png", "localhost.example.com"),
    ("https://1.1.1.1.example.com/a.png", "1.1.1.1.example.com"),
    ("https://0x7f.example.com/a.png", "0x7f.example.com"),
    ("https://internal.example.com/a.png", "internal.example.com"),
    ("https://8.8.8.8/a.png", "8.8.8.8"),
    ("https://[2606:4700:4700:0:0:0:0:1111]/a.png", "2606:4700:4700::1111"),
    ("https://[2606:4700::1]:443/a.png", "2606:4700::1"),
)

MIXED_ANSWERS = (
    ("8.8.8.8", "10.0.0.1"),
    ("10.0.0.1", "8.8.8.8"),
    ("8.8.8.8", "1.1.1.1", "169.254.169.254"),
    ("2606:4700::1", "127.0.0.1"),
    ("8.8.8.8", "::1"),
    ("8.8.8.8", "::ffff:10.0.0.1"),
    ("8.8.8.8", "fe80::1%eth0"),
    ("2606:4700::1", "fd00:ec2::254"),
    ("8.8.8.8", "0.0.0.0"),  # noqa: S104 - an answer, nothing binds to it
    ("8.8.8.8", "no address"),
)
