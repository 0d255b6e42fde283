"""The address policy, every row of its tables. The dialled addresses are tested in test_client.py."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import FetchRefused
from storage.fetch.addresses import (
    IPV4_ROWS,
    IPV6_ROWS,
    AddressPolicy,
    check_url,
    forbidden,
    forbidden_even_listed,
    hidden_ipv4,
)
from tests.address_vectors import ALLOWED_ADDRESSES, ALLOWED_URLS, FORBIDDEN_ADDRESSES, REFUSED_URLS

ANYWHERE = AddressPolicy()


def test_every_forbidden_address_is_refused_with_a_reason() -> None:
    assert [text for text in FORBIDDEN_ADDRESSES if not forbidden(ipaddress.ip_address(text))] == []


def test_no_allowed_address_is_refused() -> None:
    assert [text for text in ALLOWED_ADDRESSES if forbidden(ipaddress.ip_address(text))] == []


def test_refused_urls_are_refused_for_their_reason() -> None:
    for url, reason in REFUSED_URLS:
        with pytest.raises(FetchRefused, match=reason):
            check_url(url, ANYWHERE)


def test_allowed_urls_are_rebuilt_in_ascii() -> None:
    for url, host in ALLOWED_URLS:
        target = check_url(url, ANYWHERE)
        assert (target.scheme, target.host, target.port) == ("https", host, 443)
        assert target.url.isascii()
        assert check_url(target.url, ANYWHERE) == target


def test_both_ends_of_every_block_are_refused() -> None:
    for row in (*IPV4_ROWS, *IPV6_ROWS):
        assert row.source and forbidden(row.network[0]) and forbidden(row.network[-1]), row


@given(st.ip_addresses(v=6))
def test_no_ipv6_outside_global_unicast_is_allowed(address: ipaddress.IPv6Address) -> None:
    inside = any(address in ipaddress.IPv6Network(network) for network in ("2000::/3", "64:ff9b::/96"))
    assert inside or forbidden(address)


@given(st.ip_addresses(v=4))
def test_private_ipv4_embedded_in_ipv6_is_refused(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    isatap = ipaddress.IPv6Address((0x2600 << 112) | (0x5EFE << 32) | number)
    assert hidden_ipv4(isatap) == address
    assert bool(forbidden(isatap)) == bool(forbidden(address))
    for prefix in ("::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::", "2002::"):
        shift = 80 if prefix == "2002::" else 0
        disguised = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | number << shift)
        assert hidden_ipv4(disguised) == address
        assert forbidden(disguised) or (prefix == "64:ff9b::" and not forbidden(address))


@given(st.ip_addresses())
def test_listed_host_never_reaches_metadata_or_multicast(address) -> None:
    if address.is_multicast or address.is_link_local or address.is_unspecified:
        assert forbidden_even_listed(address)


PRIVATE = ["10.0.0.1", "127.0.0.1", "172.17.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd00::1"]
METADATA = ["169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fe80::1", "0.0.0.1", "224.0.0.1"]


def test_listed_hosts_may_use_private_addresses_but_not_metadata() -> None:
    refused = [text for text in PRIVATE + METADATA if forbidden_even_listed(ipaddress.ip_address(text))]
    assert refused == METADATA


def test_listed_host_may_use_plain_http_on_its_listed_port_only() -> None:
    policy = AddressPolicy(private_hosts=frozenset({("minio", 9000), ("127.0.0.1", 80), ("::1", 8443)}))
    assert check_url("http://MINIO:9000/a?b", policy).url == "http://minio:9000/a?b"
    assert check_url("http://127.0.0.1/a", policy).authority == "127.0.0.1"
    assert check_url("https://[::1]:8443/a", policy).authority == "[::1]:8443"
    for url in ("http://minio:9001/", "https://minio/", "https://127.0.0.1/", "http://[::1]:8080/"):
        with pytest.raises(FetchRefused):
            check_url(url, policy)


def test_listing_a_metadata_address_does_not_open_it() -> None:
    policy = AddressPolicy(private_hosts=frozenset({("169.254.169.254", 80)}))
    with pytest.raises(FetchRefused, match="metadata"):
        check_url("http://169.254.169.254/latest/meta-data/", policy)


@pytest.mark.parametrize("listed", ["klingai.com", ".klingai.com", "*.klingai.com", "KlingAI.com."])
def test_result_hosts_match_on_label_boundaries(listed: str) -> None:
    policy = AddressPolicy(result_hosts=(listed,), private_hosts=frozenset({("minio", 9000)}))
    assert check_url("https://klingai.com/a", policy).host == "klingai.com"
    assert check_url("https://p2-fdl.klingai.com/a", policy)
    assert check_url("http://minio:9000/a", policy)
    for host in ("evilklingai.com", "klingai.com.evil.com", "8.8.8.8", "com"):
        with pytest.raises(FetchRefused, match="RECEIVER_RESULT_HOSTS"):
            check_url(f"https://{host}/a", policy)


def test_refusals_never_repeat_path_query_or_userinfo() -> None:
    for url, _ in REFUSED_URLS:
        with pytest.raises(FetchRefused) as refusal:
            check_url(url.replace("/a.png", "/path-canary") + "?Signature=query-canary", ANYWHERE)
        assert "canary" not in str(refusal.value) and "secret" not in str(refusal.value)


def test_repr_of_a_target_shows_neither_path_nor_query() -> None:
    assert "canary" not in repr(check_url("https://cdn.example.com/canary?Signature=canary", ANYWHERE))


def test_signed_bytes_of_a_url_are_not_changed() -> None:
    url = "https://cdn.example.com/a%2Fb/~_-!$&'()*+,;=:@?Signature=a~b_-%7E&x={1}|\"<>`^"
    assert check_url(url, ANYWHERE).url == url


@given(st.text(max_size=60))
def test_any_text_is_refused_or_rebuilt_to_a_stable_url(text: str) -> None:
    try:
        target = check_url("https://" + text, ANYWHERE)
    except FetchRefused:
        return
    assert target.url.isascii()
    assert check_url(target.url, ANYWHERE) == target
