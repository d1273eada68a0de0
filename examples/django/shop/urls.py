"""POST /orders/ takes an order; GET /orders/<number>/ shows it."""

from django.urls import path

from shop.orders import views

urlpatterns = [
    path("orders/", views.take),
    path("orders/<int:number>/", views.show),
]
